//! Any bytes as an NBD client's handshake: the answers don't depend on how the bytes arrive, and are bounded.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use tapdisk::frontend::DiskInfo;
use tapdisk::frontend::nbd::negotiate::{Export, Negotiation, Step};

fn talk(data: &[u8], step_bytes: usize) -> (Vec<u8>, usize, Step) {
    let disk = DiskInfo {
        size: 1 << 30,
        sector_size: 512,
        physical_sector_size: 4096,
        read_only: false,
        name: "aio:fuzz".into(),
    };
    let export = Arc::new(Export { name: "disk".into(), disk });
    let mut out = Vec::new();
    let mut negotiation = Negotiation::new(export, &mut out);
    let (mut taken, mut end) = (0, 0);
    loop {
        end = (end + step_bytes).min(data.len());
        let (count, step) = negotiation.feed(&data[taken..end], &mut out);
        taken += count;
        if step != Step::Continue || end == data.len() {
            return (out, taken, step);
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let [step, data @ ..] = data else { return };
    let whole = talk(data, data.len().max(1));
    assert_eq!(talk(data, usize::from(*step) + 1), whole);
    assert!(whole.0.len() <= 1024 + data.len() * 64, "{} bytes of answers to {}", whole.0.len(), data.len());
});
