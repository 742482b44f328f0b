//! `ring-load info`.

use super::args::Info;
use super::{Failure, Outcome, lane};

pub(super) fn info(args: &Info) -> Result<Outcome, Failure> {
    let options = lane::options(args.connection.abi, 1, 1, 4096, None);
    let disk = lane::connect(&args.connection, &options, 4096)?.disk;
    let max_request = lane::max_request(&disk.limits);
    if args.json {
        let json = serde_json::json!({ "size": disk.bytes(), "max_request": max_request, "disk": disk });
        super::say(format_args!("{json:#}"));
        return Ok(Outcome::Good);
    }
    super::say(format_args!("size                  {} bytes ({} sectors of 512)", disk.bytes(), disk.sectors));
    super::say(format_args!("logical sector        {} bytes", disk.sector_size));
    super::say(format_args!("physical sector       {} bytes", disk.physical_sector_size));
    super::say(format_args!("read-only             {}", if disk.read_only { "yes" } else { "no" }));
    super::say(format_args!("ring page order       up to {}", disk.limits.ring_page_order));
    super::say(format_args!("queues                up to {}", disk.limits.queues));
    super::say(format_args!("data pages            up to {} in all", disk.limits.data_pages));
    super::say(format_args!("indirect segments     up to {}", disk.limits.indirect_segments));
    super::say(format_args!("request               up to {max_request} bytes"));
    Ok(Outcome::Good)
}
