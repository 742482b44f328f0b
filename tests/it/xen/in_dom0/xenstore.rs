//! The XenStore's client over the kernel's device.

use crate::common::xenstored::Client;
use crate::xen::xenstore::alike;
use nix::errno::Errno;

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn over_the_device() {
    let device = || Client::connect("/dev/xen/xenbus".as_ref());
    let (first, second) = (device(), device());
    alike::all(&first, &second, "/local/domain/0/test");
    let socket = Client::connect("/run/xenstored/socket".as_ref());
    alike::all(&socket, &first, "/local/domain/0/test-mixed");
    // The kernel's buffer has 4096 bytes for header and payload.
    let path = "/local/domain/0/test/max";
    let last = 4096 - 16 - path.len() - 1;
    first.write(path, &"v".repeat(last)).unwrap();
    assert_eq!(first.write(path, &"v".repeat(last + 1)), Err(Errno::E2BIG));
    assert_eq!(first.read(path).unwrap().len(), last);
    assert_eq!(first.read("domid").unwrap(), "0");
}
