//! `ring-load info`.

use super::args::Info;
use super::{Failure, Outcome, lane};

pub(super) fn info(args: &Info) -> Result<Outcome, Failure> {
    let options = lane::options(args.connection.abi, 1, 1, 4096, None);
    let disk = lane::connect(&args.connection, &options, 4096)?.disk;
    let max_request = lane::max_request(&disk.limits);
    if args.json {
        let json = serde_json::json!({ "size": disk.bytes(), "max_request": max_request, "disk": disk });
        println!("{json:#}");
        return Ok(Outcome::Good);
    }
    println!("size                  {} bytes ({} sectors of 512)", disk.bytes(), disk.sectors);
    println!("logical sector        {} bytes", disk.sector_size);
    println!("physical sector       {} bytes", disk.physical_sector_size);
    println!("read-only             {}", if disk.read_only { "yes" } else { "no" });
    println!("ring page order       up to {}", disk.limits.ring_page_order);
    println!("queues                up to {}", disk.limits.queues);
    println!("data pages            up to {} in all", disk.limits.data_pages);
    println!("indirect segments     up to {}", disk.limits.indirect_segments);
    println!("request               up to {max_request} bytes");
    Ok(Outcome::Good)
}
