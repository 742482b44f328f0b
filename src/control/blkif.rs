//! XENBLKIF_CONNECT and XENBLKIF_DISCONNECT: what tapback asks for.

use slog::{Logger, info};
use zerocopy::IntoBytes;

use super::answer::{Late, no_disk, refused};
use super::proto::{Blkif, Message, blkif, kind, text};
use crate::disk::Disk;
use crate::frontend::blkif::wire::Abi;
use crate::frontend::xen::ring::RingAt;
use crate::frontend::xen::tapback::{GuestAt, GuestError, RING_PAGE_ORDER_MAX};
use crate::minors::{MinorError, Minors};
use crate::polling::{POLL_US_MAX, Polling};

/// DOMID_FIRST_RESERVED of Xen's public header `xen.h`: no guest has this number, or a higher one.
const DOMID_FIRST_RESERVED: u32 = 0x7ff0;

/// The answer to XENBLKIF_CONNECT.
pub(super) fn connect(request: &Message, minors: &mut Minors, polling: &mut Polling, log: &Logger) -> Vec<u8> {
    let (cookie, wanted): (u16, Blkif) = (request.cookie, request.member());
    // A guest that another disk serves is refused by that one.
    let served = minors.disk_of_guest(wanted.domid, wanted.devid).is_some();
    let disk = if served { minors.disk_of_guest(wanted.domid, wanted.devid) } else { minors.disk_mut(cookie) };
    let Some(disk) = disk else { return no_disk(cookie) };
    let outcome = guest_at(&wanted).and_then(|at| disk.connect_guest(&at));
    if let Err(error) = outcome {
        return refuse(cookie, disk, &error);
    }
    poll(&wanted, polling, log);
    Message::new(kind::XENBLKIF_CONNECT_RSP, cookie).as_bytes().to_vec()
}

/// What the message says, if it can be.
fn guest_at(wanted: &Blkif) -> Result<GuestAt, GuestError> {
    let wrong = |text: String| Err(GuestError::Malformed(text));
    let &Blkif { domid, devid: device, gref, order, proto, pool, port, .. } = wanted;
    let domain = match u16::try_from(domid) {
        Ok(domain) if domid < DOMID_FIRST_RESERVED => domain,
        _ => return wrong(format!("{domid} is no domain's number; expected one below {DOMID_FIRST_RESERVED}")),
    };
    if order > RING_PAGE_ORDER_MAX {
        return wrong(format!(
            "a ring of page order {order} has no room in the message; at most {RING_PAGE_ORDER_MAX}"
        ));
    }
    let abi = match proto {
        blkif::NATIVE => Abi::Native,
        blkif::X86_32 => Abi::X86_32,
        blkif::X86_64 => Abi::X86_64,
        _ => return wrong(format!("protocol {proto} is not known; expected 1 (native), 2 (x86_32) or 3 (x86_64)")),
    };
    let Some(pool) = text(&pool) else { return wrong("the pool's name has no end".into()) };
    let ring = RingAt { grefs: gref[..1 << order].to_vec(), event_channel: port };
    Ok(GuestAt { domain, device, abi, ring, pool: pool.to_owned() })
}

/// Polls as the toolstack wants it for this guest: on the main loop, and so for all that it serves. What is beyond our
/// range is the most that there is: a guest must not be without its disk for that.
fn poll(wanted: &Blkif, polling: &mut Polling, log: &Logger) {
    let given = |value: u32, max: u32| (value > 0).then_some(value.min(max));
    let (us, percent) = (given(wanted.poll_duration, POLL_US_MAX), given(wanted.poll_idle_threshold, 100));
    if (us.is_some() || percent.is_some()) && polling.set(us, percent).is_ok() {
        let settings = polling.settings();
        info!(log, "polling set"; "poll_us" => settings.poll_us, "poll_idle_percent" => settings.poll_idle_percent);
    }
}

/// The answer to XENBLKIF_DISCONNECT, or that it comes when the guest's requests are finished, by [`disconnected`]. The
/// message names no minor: tapback says 0, whatever it is.
pub(super) fn disconnect(request: &Message, minors: &mut Minors) -> Result<Vec<u8>, Late> {
    let (cookie, Blkif { domid, devid, .. }) = (request.cookie, request.member());
    let Some(disk) = minors.disk_of_guest(domid, devid) else {
        let error = GuestError::Unknown(domid, devid);
        return Ok(refused(cookie, &MinorError::new(error.errno(), error.to_string())));
    };
    match disk.disconnect_guest(domid, devid) {
        Ok(()) => disconnected(cookie, minors, domid, devid).ok_or(Late::Disconnect(cookie, domid, devid)),
        Err(error) => Ok(refuse(cookie, disk, &error)),
    }
}

/// The answer to XENBLKIF_DISCONNECT, if the guest's requests are finished.
pub(super) fn disconnected(cookie: u16, minors: &mut Minors, domid: u32, devid: u32) -> Option<Vec<u8>> {
    let leaves = minors.disk_of_guest(domid, devid).is_some_and(|disk| disk.guest_leaves(domid, devid));
    (!leaves).then(|| Message::new(kind::XENBLKIF_DISCONNECT_RSP, cookie).as_bytes().to_vec())
}

fn refuse(cookie: u16, disk: &Disk, error: &GuestError) -> Vec<u8> {
    let text = format!("{}: {error}", disk.info().name);
    refused(cookie, &MinorError::new(error.errno(), text))
}
