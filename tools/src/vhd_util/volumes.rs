//! The logical volumes of a group, active or not. LVM's own tools say where they are (lvs(8), pvs(8)), and they are read from there.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use drivers::vhd::Source;
use nix::errno::Errno;

use super::failure::{Failure, Result};

/// A logical volume.
#[derive(Clone, Debug, Default)]
pub(super) struct Volume {
    /// Bytes.
    pub(super) size: u64,
    segments: Vec<Segment>,
}

/// A part of a volume that is in one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Segment {
    /// First byte of the volume.
    start: u64,
    /// Bytes.
    len: u64,
    /// Where it is: a device, and the first byte there.
    device: PathBuf,
    at: u64,
}

/// The volumes of a group, by their devices' names.
pub(super) fn volumes(group: &str) -> Result<HashMap<PathBuf, Volume>> {
    let physical = report("pvs", &["-o", "pv_name,pe_start"], group)?;
    let starts: HashMap<_, _> = physical
        .lines()
        .filter_map(|line| line.trim().split_once('|'))
        .filter_map(|(name, start)| Some((name, start.parse().ok()?)))
        .collect();
    let columns = "lv_name,lv_size,segtype,seg_start,seg_size,devices,vg_extent_size";
    let logical = report("lvs", &["-o", columns, group], group)?;
    let mut volumes: HashMap<PathBuf, Volume> = HashMap::new();
    for line in logical.lines() {
        let Some((name, size, segment)) = parse(line.trim(), &starts) else { continue };
        let volume = volumes.entry(Path::new("/dev").join(group).join(name)).or_default();
        volume.size = size;
        volume.segments.extend(segment);
    }
    Ok(volumes)
}

fn report(program: &str, columns: &[&str], group: &str) -> Result<String> {
    let mut command = Command::new(program);
    command.args(["--noheadings", "--nosuffix", "--units", "b", "--separator", "|"]).args(columns);
    let output = command.output().map_err(|error| {
        Failure::new(
            Errno::ENOENT,
            Path::new(group),
            format!("cannot run {program}: {error}; it is in the package lvm2"),
        )
    })?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let last = errors.trim().lines().next_back().unwrap_or("no reason given").trim();
        return Err(Failure::new(Errno::ENODEV, Path::new(group), format!("{program}: {last}")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A line of lvs: the volume's name, its bytes, and, if it is one that can be read, a segment of it.
fn parse<'a>(line: &'a str, starts: &HashMap<&str, u64>) -> Option<(&'a str, u64, Option<Segment>)> {
    let fields: Vec<_> = line.split('|').collect();
    let [name, size, kind, start, len, devices, extent] = fields[..] else { return None };
    let segment = || {
        let (device, first) = devices.strip_suffix(')')?.rsplit_once('(')?;
        let (first, extent): (u64, u64) = (first.parse().ok()?, extent.parse().ok()?);
        let at = starts.get(device)? + first * extent;
        Some(Segment { start: start.parse().ok()?, len: len.parse().ok()?, device: device.into(), at })
    };
    // Others, such as mirrors, are put together of several.
    Some((name, size.parse().ok()?, (kind == "linear").then(segment).flatten()))
}

impl Volume {
    /// Opens the devices that it is on.
    pub(super) fn open(&self) -> io::Result<OpenVolume> {
        let parts = self.segments.iter().map(|segment| Ok((segment.clone(), File::open(&segment.device)?)));
        Ok(OpenVolume { size: self.size, parts: parts.collect::<io::Result<_>>()? })
    }
}

/// A volume that is read.
pub(super) struct OpenVolume {
    size: u64,
    parts: Vec<(Segment, File)>,
}

impl Source for OpenVolume {
    fn size(&self) -> io::Result<u64> {
        Ok(self.size)
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        let (mut at, mut to) = (at, to);
        while !to.is_empty() {
            let part =
                self.parts.iter().find(|(segment, _)| (segment.start..segment.start + segment.len).contains(&at));
            let (segment, file) = part.ok_or(io::ErrorKind::Unsupported)?;
            let count = to.len().min((segment.start + segment.len - at) as usize);
            let (now, rest) = to.split_at_mut(count);
            file.read_exact_at(now, segment.at + (at - segment.start))?;
            (at, to) = (at + count as u64, rest);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_where_its_extents_are() {
        let starts = HashMap::from([("/dev/loop0", 1 << 20)]);
        let line = "VHD-b|33554432|linear|4194304|29360128|/dev/loop0(5)|4194304";
        let segment =
            Segment { start: 4 << 20, len: 28 << 20, device: "/dev/loop0".into(), at: (1 << 20) + 5 * (4 << 20) };
        assert_eq!(parse(line, &starts), Some(("VHD-b", 32 << 20, Some(segment))));
        let mirror = "m|4194304|raid1|0|4194304|m_rimage_0(0),m_rimage_1(0)|4194304";
        assert_eq!(parse(mirror, &starts), Some(("m", 4 << 20, None)));
        assert_eq!(parse("nothing", &starts), None);
    }
}
