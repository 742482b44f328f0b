//! `top`: what all disks of the host do, again and again.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args;
use crossterm::event::{Event, KeyCode, KeyModifiers, poll, read};
use crossterm::style::{Attribute, Print, SetAttribute};
use crossterm::terminal::{
    Clear, ClearType, DisableLineWrap, EnableLineWrap, EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode,
    enable_raw_mode, size,
};
use crossterm::{cursor, execute, queue};
use serde::Serialize;
use tapdisk::metrics::{DiskMetrics, ProcessMetrics};
use tapdisk::stats::latency::Latency;
use tapdisk::text::{Plain, one_line};

use super::collect::{Answer, Collector};

/// How long a tapdisk may take to answer before it counts as one that hangs.
const PATIENCE: Duration = Duration::from_secs(1);

/// What `top` shows, and how often.
#[derive(Debug, Args)]
pub struct Top {
    /// Seconds between two looks, 0.1 to 3600
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    pub interval: Duration,
    /// Ends after so many looks. Not given: q or Ctrl-C ends it
    #[arg(long)]
    pub count: Option<u64>,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "expected seconds, 0.1 to 3600".to_owned())
}

/// One disk in one interval; or one process of whose disks nothing is known.
#[derive(Clone, Debug, Default, Serialize)]
struct Row {
    pid: i32,
    minor: Option<u16>,
    image: String,
    /// As the disk says, "hangs", or "refused".
    state: String,
    reads_per_s: f64,
    writes_per_s: f64,
    /// Read and written, 10^6 bytes a second.
    mb_per_s: f64,
    /// Requests that are not answered.
    outstanding: usize,
    /// Mean latency, µs; none if none was answered.
    read_us: Option<f64>,
    write_us: Option<f64>,
    /// Age of the oldest request, µs; of a process that does not answer, since when it does not.
    oldest_us: u64,
}

/// What a process said last, and when.
struct Seen {
    at: Instant,
    disks: BTreeMap<u16, DiskMetrics>,
}

/// Looks until it is told to end.
pub(super) fn top(out: &mut impl Write, directory: &Path, options: &Top, json: bool) -> io::Result<()> {
    let mut collector = Collector::of_metrics(directory);
    let mut seen = BTreeMap::new();
    // What there is to compare with.
    rows(collector.round(PATIENCE)?, &mut seen);
    let screen = if io::stdout().is_terminal() && !json { Some(Screen::open()?) } else { None };
    let mut shown = Vec::new();
    let mut next = Instant::now();
    for _ in 0..options.count.unwrap_or(u64::MAX) {
        next = (next + options.interval).max(Instant::now());
        match &screen {
            Some(screen) if screen.ends_before(next, || draw(out, &shown))? => return Ok(()),
            Some(_) => {}
            None => std::thread::sleep(next.saturating_duration_since(Instant::now())),
        }
        shown = rows(collector.round(PATIENCE)?, &mut seen);
        if json {
            let plain = &mut Plain(&mut *out);
            shown.iter().try_for_each(|row| writeln!(plain, "{}", serde_json::to_string(row)?))?;
        } else if screen.is_some() {
            draw(out, &shown)?;
        } else {
            writeln!(out, "{HEADER}")?;
            shown.iter().try_for_each(|row| writeln!(out, "{}", line(row, usize::MAX)))?;
        }
        out.flush()?;
    }
    Ok(())
}

/// What there is to see since the last time, the busiest first; before them, those that do not answer.
fn rows(answers: BTreeMap<i32, Answer<ProcessMetrics>>, seen: &mut BTreeMap<i32, Seen>) -> Vec<Row> {
    seen.retain(|pid, _| answers.contains_key(pid));
    let mut rows = Vec::new();
    for (pid, answer) in answers {
        match answer {
            // Whatever it says its id is.
            Answer::Told(process) => rows.extend(of_process(ProcessMetrics { pid, ..process }, seen)),
            Answer::Hangs(since) => rows.extend(unknown(pid, seen, "hangs", since)),
            Answer::Refused(why) => {
                let image = format!("({why})");
                rows.extend(
                    unknown(pid, seen, "refused", Duration::ZERO).map(|row| Row { image: image.clone(), ..row }),
                );
            }
        }
    }
    let activity = |row: &Row| row.reads_per_s + row.writes_per_s;
    rows.sort_by(|a, b| {
        let hangs = |row: &Row| row.state == "hangs";
        let order = hangs(b).cmp(&hangs(a)).then(activity(b).total_cmp(&activity(a)));
        order.then(b.outstanding.cmp(&a.outstanding)).then((a.pid, a.minor).cmp(&(b.pid, b.minor)))
    });
    rows
}

/// The disks of a process that answers.
fn of_process(process: ProcessMetrics, seen: &mut BTreeMap<i32, Seen>) -> Vec<Row> {
    let now = Instant::now();
    let pid = process.pid;
    let disks = process.disks.into_iter().map(|disk| (disk.minor, disk)).collect();
    let before = seen.insert(pid, Seen { at: now, disks });
    let row = |disk: &DiskMetrics| {
        let earlier = before.as_ref().and_then(|before| Some((before.at, before.disks.get(&disk.minor)?)));
        let seconds = earlier.map_or(f64::INFINITY, |(at, _)| (now - at).as_secs_f64());
        let none = (0, None, 0);
        let op = |name| earlier.map_or(none, |(_, earlier)| between(earlier, disk, name));
        let (reads, read_us, bytes_read) = op("read");
        let (writes, write_us, bytes_written) = op("write");
        Row {
            pid,
            minor: Some(disk.minor),
            image: disk.image.clone(),
            state: disk.state.clone(),
            reads_per_s: reads as f64 / seconds,
            writes_per_s: writes as f64 / seconds,
            mb_per_s: bytes_read.saturating_add(bytes_written) as f64 / seconds / 1e6,
            outstanding: disk.outstanding,
            read_us,
            write_us,
            oldest_us: disk.oldest_us,
        }
    };
    seen[&pid].disks.values().map(row).collect()
}

/// Requests of one kind between two looks: how many, their mean latency in µs, and their bytes.
fn between(earlier: &DiskMetrics, now: &DiskMetrics, name: &str) -> (u64, Option<f64>, u64) {
    let none = Latency::default();
    let Some(op) = now.op(name) else { return (0, None, 0) };
    let before = earlier.op(name);
    let bytes = op.bytes.saturating_sub(before.map_or(0, |before| before.bytes));
    match op.latency.since(before.map_or(&none, |before| &before.latency)) {
        Some((count, mean)) => (count, Some(mean), bytes),
        None => (0, None, bytes),
    }
}

/// The disks of a process that says nothing, as far as they are known.
fn unknown(pid: i32, seen: &BTreeMap<i32, Seen>, state: &str, since: Duration) -> impl Iterator<Item = Row> {
    let of_process = Row { pid, state: state.to_owned(), oldest_us: since.as_micros() as u64, ..Row::default() };
    let disks = seen.get(&pid).into_iter().flat_map(|seen| seen.disks.values());
    let mut rows: Vec<_> =
        disks.map(|disk| Row { minor: Some(disk.minor), image: disk.image.clone(), ..of_process.clone() }).collect();
    if rows.is_empty() {
        rows.push(of_process);
    }
    rows.into_iter()
}

/// In a terminal of 80 columns there is room for the end of the image's path.
const HEADER: &str = "    PID MINOR STATE       R/S    W/S   MB/S   QD R-MEAN W-MEAN OLDEST IMAGE";

/// A line, with all of the image's path, or as much of its end as there is room for in `width` characters.
fn line(row: &Row, width: usize) -> String {
    let Row { pid, state, reads_per_s, writes_per_s, mb_per_s, outstanding, read_us, write_us, .. } = row;
    let minor = row.minor.map_or("-".to_owned(), |minor| minor.to_string());
    let mean = |us: &Option<f64>| us.map_or("-".to_owned(), time);
    let oldest = if row.oldest_us == 0 { "-".to_owned() } else { time(row.oldest_us as f64) };
    let (reads, writes, read, write) = (rate(*reads_per_s), rate(*writes_per_s), mean(read_us), mean(write_us));
    let columns = format!(
        "{pid:>7} {minor:>5} {state:<8} {reads:>6} {writes:>6} {mb_per_s:>6.1} {outstanding:>4} {read:>6} {write:>6} \
         {oldest:>6} "
    );
    // A file's name can have any character, and so can what a tapdisk says; some steer a terminal.
    let (columns, shown) = (one_line(&columns).into_owned(), one_line(&row.image));
    let image = shown.chars();
    let (room, length) = (width.saturating_sub(columns.chars().count()), shown.chars().count());
    if length <= room {
        columns + &image.collect::<String>()
    } else {
        let end: String = image.skip(length + 1 - room.max(1)).collect();
        format!("{columns}<{end}").chars().take(width).collect()
    }
}

/// A number a second, in six characters.
fn rate(per_s: f64) -> String {
    match per_s {
        ..1e5 => format!("{per_s:.0}"),
        ..1e6 => format!("{:.1}k", per_s / 1e3),
        _ => format!("{:.2}M", per_s / 1e6),
    }
}

/// Microseconds, in six characters.
fn time(us: f64) -> String {
    match us {
        ..1e3 => format!("{us:.0}us"),
        ..1e5 => format!("{:.1}ms", us / 1e3),
        ..1e6 => format!("{:.0}ms", us / 1e3),
        ..6e8 => format!("{:.1}s", us / 1e6),
        _ => format!("{:.0}m", us / 6e7),
    }
}

/// Fills the terminal.
fn draw(out: &mut impl Write, rows: &[Row]) -> io::Result<()> {
    let (width, height) = size().unwrap_or((80, 24));
    let (width, height) = (usize::from(width), usize::from(height));
    let cut = |text: &str| text.chars().take(width).collect::<String>();
    let sum = |of: fn(&Row) -> f64| rows.iter().map(of).sum::<f64>();
    let hang = rows.iter().filter(|row| row.state == "hangs").count();
    let title = format!(
        "{} disks, {hang} hang; {:.0} reads/s, {:.0} writes/s, {:.1} MB/s; q ends",
        rows.len(),
        sum(|row| row.reads_per_s),
        sum(|row| row.writes_per_s),
        sum(|row| row.mb_per_s)
    );
    queue!(out, cursor::MoveTo(0, 0), Print(cut(&title)), Clear(ClearType::UntilNewLine))?;
    if height > 1 {
        let header = format!("{:<width$}", cut(HEADER));
        queue!(out, cursor::MoveTo(0, 1), SetAttribute(Attribute::Reverse), Print(header))?;
        queue!(out, SetAttribute(Attribute::Reset))?;
    }
    let room = height.saturating_sub(2);
    for (at, row) in rows.iter().take(room).enumerate() {
        let more = at + 1 == room && rows.len() > room;
        let text = if more { format!("... and {} more", rows.len() - at) } else { line(row, width) };
        queue!(out, cursor::MoveTo(0, at as u16 + 2), Print(cut(&text)), Clear(ClearType::UntilNewLine))?;
    }
    if rows.len() < room {
        queue!(out, cursor::MoveTo(0, rows.len() as u16 + 2), Clear(ClearType::FromCursorDown))?;
    }
    out.flush()
}

/// The terminal, which is as it was when this is dropped.
struct Screen;

impl Screen {
    fn open() -> io::Result<Screen> {
        enable_raw_mode()?;
        let screen = Screen;
        execute!(io::stdout(), EnterAlternateScreen, cursor::Hide, DisableLineWrap)?;
        Ok(screen)
    }

    /// Takes keys until `end`. True: one of them ends it all.
    fn ends_before(&self, end: Instant, mut draw: impl FnMut() -> io::Result<()>) -> io::Result<bool> {
        while poll(end.saturating_duration_since(Instant::now()))? {
            match read()? {
                Event::Key(key) => {
                    let control = key.modifiers.contains(KeyModifiers::CONTROL);
                    match key.code {
                        KeyCode::Char('c') if control => return Ok(true),
                        KeyCode::Char('q') | KeyCode::Esc => return Ok(true),
                        _ => {}
                    }
                }
                Event::Resize(..) => draw()?,
                _ => {}
            }
        }
        Ok(false)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Where the terminal is gone there is nothing to restore.
        let _ = execute!(io::stdout(), EnableLineWrap, cursor::Show, LeaveAlternateScreen);
        let _ = disable_raw_mode();
    }
}

#[cfg(test)]
mod tests {
    use tapdisk::stats::OpTraffic;

    use super::*;

    fn process(pid: i32, reads: u64) -> ProcessMetrics {
        let mut latency = Latency::default();
        (0..reads).for_each(|_| latency.record(2_000));
        let read = OpTraffic { op: "read".into(), bytes: reads * 4096, errors: 0, latency };
        let disk = DiskMetrics {
            minor: 3,
            image: format!("aio:/{pid}"),
            state: "running".into(),
            operations: vec![read],
            ..DiskMetrics::default()
        };
        ProcessMetrics { pid, up: true, disks: vec![disk], ..ProcessMetrics::default() }
    }

    fn answers(all: Vec<ProcessMetrics>) -> BTreeMap<i32, Answer<ProcessMetrics>> {
        all.into_iter().map(|process| (process.pid, Answer::Told(process))).collect()
    }

    #[test]
    fn rates_are_those_of_the_interval_and_the_busiest_is_first() {
        let mut seen = BTreeMap::new();
        let first = rows(answers(vec![process(1, 1000), process(2, 0)]), &mut seen);
        assert!(first.iter().all(|row| row.reads_per_s == 0.0 && row.read_us.is_none()), "nothing to compare with");
        seen.values_mut().for_each(|seen| seen.at -= Duration::from_secs(10));
        let second = rows(answers(vec![process(1, 1000), process(2, 100), process(3, 7)]), &mut seen);
        let pids: Vec<_> = second.iter().map(|row| row.pid).collect();
        assert_eq!(pids, [2, 1, 3]);
        assert!((9.0..=10.0).contains(&second[0].reads_per_s), "{second:?}");
        assert!((0.036..=0.041).contains(&second[0].mb_per_s), "{second:?}");
        assert_eq!((second[0].read_us, second[1].read_us), (Some(2.0), None));
    }

    #[test]
    fn a_process_that_hangs_keeps_its_disks_and_one_that_counts_anew_has_no_rates() {
        let mut seen = BTreeMap::new();
        rows(answers(vec![process(1, 5), process(2, 5)]), &mut seen);
        let mut second = answers(vec![process(2, 1)]);
        second.insert(1, Answer::Hangs(Duration::from_secs(2)));
        second.insert(9, Answer::Hangs(Duration::from_secs(3)));
        second.insert(10, Answer::Refused("old".into()));
        let shown = rows(second, &mut seen);
        let text: Vec<_> = shown.iter().map(|row| (row.pid, row.minor, row.image.as_str(), &*row.state)).collect();
        assert_eq!(
            text,
            [
                (1, Some(3), "aio:/1", "hangs"),
                (9, None, "", "hangs"),
                (2, Some(3), "aio:/2", "running"),
                (10, None, "(old)", "refused"),
            ]
        );
        assert_eq!((shown[0].oldest_us, shown[2].reads_per_s), (2_000_000, 0.0));
    }

    #[test]
    fn a_line_fits_its_columns_and_steers_no_terminal() {
        let disk =
            |image: &str| Row { image: image.into(), state: "flushing".into(), minor: Some(16383), ..Row::default() };
        let text = line(&disk("aio:/a\u{1b}[2Jb"), usize::MAX);
        assert!(!text.contains('\u{1b}') && text.ends_with(" aio:/a\\u{1b}[2Jb"), "{text:?}");
        assert_eq!(text.find("aio:"), HEADER.find("IMAGE"));
        let text = line(&disk("vhd:/srv/vm/\u{e9}guest.vhd"), 80);
        assert!(text.chars().count() == 80 && text.ends_with(" <guest.vhd"), "{text:?}");
        assert!(line(&disk("vhd:/x"), 80).ends_with(" vhd:/x"));
        for width in 0..75 {
            assert!(line(&disk("vhd:/srv/vm/guest.vhd"), width).len() <= width);
        }
    }

    #[test]
    fn numbers_fit_their_columns() {
        let times = [7.4, 999.4, 1_234.0, 99_940.0, 123_456.0, 2_500_000.0, 7_200_000_000.0].map(time);
        assert_eq!(times, ["7us", "999us", "1.2ms", "99.9ms", "123ms", "2.5s", "120m"]);
        assert_eq!([0.4, 99_999.0, 123_456.0, 3_912_345.0].map(rate), ["0", "99999", "123.5k", "3.91M"]);
    }
}
