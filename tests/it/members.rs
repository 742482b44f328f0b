//! What a member of `control.group`, who is not root, can have a tapdisk of root do: with images that the member could open, in the folders of
//! `control.folders`; and nothing with files of root's, by no link, name, chain or swap.

use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::host::said;
use crate::common::live::{ctl, name, refused, state, wait_stage};
use crate::common::needs;
use crate::common::served::{Served, run, tool};
use crate::common::vhd::{Said, good, write};
use crate::common::vhd_made::table;
use nix::libc;
use nix::sys::signal::Signal;
use tapdisk::minors::marker;
use tempfile::TempDir;

const NOBODY: u32 = 65534;
const MIB: usize = 1 << 20;

/// A tapdisk of root, whose control socket a group may use, and a member. In the folder `images` the configured image is, which is
/// root's; `images/own` is the member's folder, and `elsewhere` is another one.
struct World {
    folder: TempDir,
    served: Served,
}

fn mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// A MiB of a byte.
fn raw(path: &Path, byte: u8, owner: u32, permissions: u32) {
    std::fs::write(path, vec![byte; MIB]).unwrap();
    chown(path, Some(owner), Some(owner)).unwrap();
    mode(path, permissions);
}

impl World {
    /// With the disk of an image table, in which `{f}` is the folder.
    fn new(image: &str, prepare: impl FnOnce(&Path)) -> World {
        let folder = tempfile::tempdir().unwrap();
        mode(folder.path(), 0o755);
        let path = |name: &str| folder.path().join(name);
        for (name, owner) in [("images", 0), ("images/own", NOBODY), ("elsewhere", NOBODY)] {
            std::fs::create_dir(path(name)).unwrap();
            chown(path(name), Some(owner), None).unwrap();
            mode(&path(name), 0o755);
        }
        std::fs::copy(tool("tap-ctl").get_program(), path("tap-ctl")).unwrap();
        raw(&path("secret"), b's', 0, 0o600);
        prepare(folder.path());
        let control = "[control]\ndirectory = '{s}'\ngroup = 'nogroup'\nfolders = ['{f}/images']\n";
        let place = |text: &str| text.replace("{f}", folder.path().to_str().unwrap());
        let served = Served::start(&place(image), &place(control));
        mode(served.sockets(), 0o755);
        World { folder, served }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs `tap-ctl` as a member.
    fn member(&self, words: &[&str]) -> Said {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(self.path("tap-ctl"));
        said(command.arg("--directory").arg(self.served.sockets()).args(words).arg("--debug"))
    }

    fn may(&self, words: &[&str]) {
        let said = self.member(words);
        assert_eq!((said.code, said.err.as_str()), (0, ""), "{words:?}: {}", self.served.log());
    }

    fn may_not(&self, words: &[&str], errno: i32, text: &str) {
        let said = self.member(words);
        assert!(said.code == errno && said.err.contains(text), "{words:?}: {}, {}", said.code, said.err);
    }

    /// Attaches another minor, without an image.
    fn attach(&self) -> String {
        let (minor, _) = marker::allocate(self.served.sockets()).unwrap();
        self.may(&["attach", "-p", &self.served.pid().to_string(), "-m", &minor.to_string()]);
        minor.to_string()
    }

    fn open(&self, minor: &str, image: &str, more: &[&str]) -> Said {
        let pid = self.served.pid().to_string();
        self.member(&[&["open", "-p", &pid, "-m", minor, "-a", image], more].concat())
    }

    fn secret_is_whole_on_disk(&self) {
        assert!(std::fs::read(self.path("secret")).unwrap().iter().all(|byte| *byte == b's'));
    }

    /// Nobody has read root's file, or written it.
    fn secret_is_whole(&self) {
        self.secret_is_whole_on_disk();
        let open = std::fs::read_dir(format!("/proc/{}/fd", self.served.pid())).unwrap();
        let open = open.filter_map(|entry| entry.unwrap().path().read_link().ok());
        assert_eq!(open.filter(|path| *path == self.path("secret")).count(), 0);
    }
}

const CONFIGURED: &str = "type = 'aio'\npath = '{f}/images/configured'\ndirect = 'off'";

fn root_configured(folder: &Path) {
    raw(&folder.join("images/configured"), b'c', 0, 0o600);
}

fn members_configured(folder: &Path) {
    raw(&folder.join("images/configured"), b'c', NOBODY, 0o600);
}

#[test]
fn members_open_what_they_could_open_themselves_below_the_folders() {
    if !needs::root() {
        return;
    }
    let world = World::new(CONFIGURED, root_configured);
    let minor = world.attach();
    let own = |name: &str| world.path("images/own").join(name);
    raw(&own("good"), b'g', NOBODY, 0o600);
    raw(&own("roots"), b'r', 0, 0o600);
    raw(&own("readable"), b'r', 0, 0o644);
    raw(&world.path("elsewhere/mine"), b'm', NOBODY, 0o600);
    symlink("good", own("link")).unwrap();
    symlink("../../elsewhere/mine", own("link-out")).unwrap();
    symlink("../../secret", own("link-to-secret")).unwrap();
    std::fs::hard_link(world.path("secret"), own("hard")).unwrap();
    symlink("../../elsewhere", own("folder-link")).unwrap();
    good("create -n {} -s 64", &[&world.path("elsewhere/base.vhd")]);
    let stranger = own("stranger.vhd");
    good("snapshot -n {} -p {}", &[&stranger, &world.path("elsewhere/base.vhd")]);
    for path in [&stranger, &world.path("elsewhere/base.vhd")] {
        chown(path, Some(NOBODY), None).unwrap();
    }
    let raw_child = own("raw-child.vhd");
    good("snapshot -n {} -p {} -m", &[&raw_child, &own("readable")]);
    chown(&raw_child, Some(NOBODY), None).unwrap();
    let pid = world.served.pid().to_string();
    for image in ["good", "link", "../own/good"] {
        let said = world.open(&minor, &name("aio", &own(image)), &[]);
        assert_eq!((said.code, said.err.as_str()), (0, ""), "{image}");
        world.may(&["close", "-p", &pid, "-m", &minor]);
    }
    let (denied, outside) = ("ermission denied", "control.folders");
    for (image, more, text) in [
        ("aio:roots", &[][..], denied),
        ("aio:roots", &["-R"], denied),
        ("aio:readable", &[], denied),
        ("aio:../configured", &[], denied),
        ("aio:link-to-secret", &["-R"], denied),
        ("aio:../../secret", &["-R"], denied),
        ("aio:hard", &["-R"], denied),
        ("aio:link-out", &[], outside),
        ("aio:folder-link/mine", &[], outside),
        ("aio:../../elsewhere/mine", &[], outside),
        ("aio:/etc/passwd", &["-R"], outside),
        ("vhd:stranger.vhd", &[], "another folder"),
    ] {
        let (kind, image) = image.split_once(':').unwrap();
        let said = world.open(&minor, &name(kind, &own(image)), more);
        let errno = if text == "another folder" { libc::EINVAL } else { libc::EACCES };
        assert!(said.code == errno && said.err.contains(text), "{image}: {}, {}", said.code, said.err);
    }
    // What one may read, one may have read, also below an image of one's own.
    for image in [name("aio", &own("readable")), name("vhd", &raw_child)] {
        let said = world.open(&minor, &image, &["-R"]);
        assert_eq!((said.code, said.err.as_str()), (0, ""), "{image}");
        world.may(&["close", "-p", &pid, "-m", &minor]);
    }
    // The parent, too, is opened with the member's rights.
    mode(&own("readable"), 0o600);
    let said = world.open(&minor, &name("vhd", &raw_child), &["-R"]);
    assert!(said.code == libc::EACCES && said.err.contains(denied), "{}, {}", said.code, said.err);
    std::fs::remove_file(own("readable")).unwrap();
    symlink("../../secret", own("readable")).unwrap();
    let said = world.open(&minor, &name("vhd", &raw_child), &["-R"]);
    assert!(said.code == libc::EACCES && said.err.contains(denied), "{}, {}", said.code, said.err);
    world.secret_is_whole();
}

/// What a tapdisk has open is behind links in /proc that lead past all folders.
#[test]
fn no_descriptor_of_the_tapdisks_leads_a_member_past_a_folder() {
    if !needs::root() {
        return;
    }
    let image = "type = 'aio'\npath = '{f}/images/private/roots'\ndirect = 'off'\nread_only = true";
    let world = World::new(image, |folder| {
        let private = folder.join("images/private");
        std::fs::create_dir(&private).unwrap();
        mode(&private, 0o700);
        raw(&private.join("roots"), b'r', 0, 0o644);
    });
    let minor = world.attach();
    let roots = world.path("images/private/roots");
    let open = std::fs::read_dir(format!("/proc/{}/fd", world.served.pid())).unwrap();
    let open: Vec<_> = open.map(|entry| entry.unwrap().path()).collect();
    let open: Vec<_> = open.iter().filter(|link| link.read_link().is_ok_and(|name| name == roots)).collect();
    assert!(!open.is_empty());
    for link in open {
        let image = format!("aio:/proc/self/fd/{}", link.file_name().unwrap().display());
        let said = world.open(&minor, &image, &["-R"]);
        let text = "cannot open it by its own name: Permission denied";
        assert!(said.code == libc::EACCES && said.err.contains(text), "{image}: {}, {}", said.code, said.err);
    }
}

#[test]
fn without_folders_members_name_no_image_and_root_names_any() {
    if !needs::root() {
        return;
    }
    let world = World::new(CONFIGURED, members_configured);
    let served = Served::start(
        &format!("type = 'aio'\npath = '{}'\nlock = false", world.path("images/configured").display()),
        "[control]\ndirectory = '{s}'\ngroup = 'nogroup'\n",
    );
    mode(served.sockets(), 0o755);
    let world = World { folder: world.folder, served };
    raw(&world.path("images/own/mine"), b'm', NOBODY, 0o600);
    let image = name("aio", &world.path("images/own/mine"));
    world.may(&["pause"]);
    world.may_not(&["unpause", "-a", &image], libc::EACCES, "none is configured");
    world.may_not(&["unpause", "-c", "/log"], libc::EACCES, "none is configured");
    world.may(&["unpause"]);
    world.may(&["pause"]);
    assert_eq!(ctl(&world.served, &["unpause", "-a", &image]).code, 0);
}

#[test]
fn a_tapdisk_that_can_not_be_the_member_opens_nothing_for_a_member() {
    if !needs::root() {
        return;
    }
    let world = World::new(CONFIGURED, members_configured);
    let mut command = Command::new("setpriv");
    command.arg("--bounding-set=-setuid").arg(tool("tapdisk").get_program());
    let folders = format!("folders = ['{}']", world.path("images").display());
    let control = format!("[control]\ndirectory = '{{s}}'\ngroup = 'nogroup'\n{folders}\n");
    let image = format!("path = '{}'\nlock = false", world.path("images/configured").display());
    let served = Served::start_by(command, "", &image, &control);
    mode(served.sockets(), 0o755);
    let world = World { folder: world.folder, served };
    raw(&world.path("images/own/mine"), b'm', NOBODY, 0o600);
    let image = name("aio", &world.path("images/own/mine"));
    world.may(&["pause"]);
    world.may_not(&["unpause", "-a", &image], libc::EACCES, "with the rights of user 65534");
    assert_eq!(ctl(&world.served, &["unpause", "-a", &image]).code, 0);
}

#[test]
fn what_concerns_all_disks_or_a_guest_is_for_root_alone() {
    if !needs::root() {
        return;
    }
    let mut world = World::new(CONFIGURED, root_configured);
    for words in [
        &["exit"][..],
        &["poll", "--us", "10"],
        &["engine", "--threads-max", "2"],
        &["engine", "--name", "threads"],
        &["fault", "--release"],
        &["throttle", "--off"],
        &["throttle", "--requests", "10"],
    ] {
        world.may_not(words, libc::EPERM, "is for root alone");
    }
    world.served.wait_log("a member of control.group may not ask for that");
    assert!(world.served.log().contains("uid: 65534"), "{}", world.served.log());
    for words in [
        &["poll"][..],
        &["engine"],
        &["throttle"],
        &["list"],
        &["stats"],
        &["debug-queue"],
        &["metrics"],
        &["pause"],
        &["unpause"],
    ] {
        world.may(words);
    }
    let kinds = "import socket,struct,sys\nfor kind in (24,26):\n s=socket.socket(socket.AF_UNIX)\n s.connect(sys.argv[1])\n \
                 s.sendall(struct.pack('<HHI',kind,0,0)+bytes(536))\n d=s.recv(544,socket.MSG_WAITALL)\n \
                 print(*struct.unpack('<H',d[:2]),*struct.unpack('<i',d[8:12]))";
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", kinds]);
    let socket = tapdisk::control::client::path(world.served.sockets(), world.served.pid());
    assert_eq!(run(command.arg(socket)), format!("1 {0}\n1 {0}\n", libc::EPERM));
    assert!(world.served.alive());
}

#[test]
fn a_guests_data_goes_to_a_members_image_only_if_the_member_could_have_had_it_before() {
    if !needs::root() {
        return;
    }
    for (may, prepare) in [(false, root_configured as fn(&Path)), (true, members_configured)] {
        let world = World::new(CONFIGURED, prepare);
        raw(&world.path("images/own/mine"), b'm', NOBODY, 0o600);
        let image = name("aio", &world.path("images/own/mine"));
        world.may(&["pause"]);
        if may {
            world.may(&["unpause", "-a", &image]);
        } else {
            world.may_not(&["unpause", "-a", &image], libc::EACCES, "take it from its disk");
            world.may(&["unpause"]);
        }
        assert_eq!(state(&world.served), "0");
    }
}

/// The image goes on being root's, and the log is the member's.
#[test]
fn a_log_of_changed_blocks_has_the_rights_of_who_has_named_it() {
    if !needs::root() {
        return;
    }
    let mut world = World::new(&format!("{CONFIGURED}\nread_only = true"), root_configured);
    let log = world.path("images/own/log").to_str().unwrap().to_owned();
    let record = |world: &World| {
        let names =
            std::fs::read_dir(world.served.sockets().join("tapdisk")).unwrap().map(|name| name.unwrap().path());
        let mut records = names.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("served-"));
        records.next().map(|path| std::fs::read_to_string(path).unwrap())
    };
    world.may(&["pause"]);
    world.may(&["unpause", "-c", &log]);
    world.served.start_again(Signal::SIGKILL).unwrap();
    // What is on record is what it was started again by.
    world.may(&["pause"]);
    let text = record(&world).unwrap();
    let (_, by) = text.split_once("[changed_blocks_by]").unwrap();
    assert!(by.contains("uid = 65534") && !text.contains("[by]"), "{text}");
    assert_eq!(ctl(&world.served, &["unpause", "-c", &log]).code, 0);
    world.may(&["pause"]);
    let text = record(&world).unwrap();
    assert!(text.contains("changed_blocks = ") && !text.contains("changed_blocks_by"), "{text}");
}

#[test]
fn a_member_has_only_logs_opened_that_the_member_could_write() {
    if !needs::root() {
        return;
    }
    let mut world = World::new(CONFIGURED, root_configured);
    let own = |name: &str| world.path("images/own").join(name);
    let secret = |path: &Path| std::fs::hard_link(world.path("secret"), path).unwrap();
    let create = |path: &Path, owner: u32| {
        run(tool("cbt-util").args(["create", "-s", "1048576", "-n"]).arg(path));
        chown(path, Some(owner), Some(owner)).unwrap();
        mode(path, 0o644);
    };
    create(&own("log"), NOBODY);
    create(&own("roots"), 0);
    create(&world.path("elsewhere/log"), NOBODY);
    symlink("log", own("link")).unwrap();
    symlink("../../secret", own("link-to-secret")).unwrap();
    secret(&own("hard"));
    symlink("../../elsewhere", own("folder-link")).unwrap();
    world.may(&["pause"]);
    for (log, errno, text) in [
        ("roots", libc::EACCES, "ermission denied"),
        ("hard", libc::EACCES, "ermission denied"),
        ("link", libc::ELOOP, "it is a link"),
        ("link-to-secret", libc::ELOOP, "it is a link"),
        ("folder-link/log", libc::EACCES, "control.folders"),
        ("../../elsewhere/log", libc::EACCES, "control.folders"),
    ] {
        world.may_not(&["unpause", "-c", own(log).to_str().unwrap()], errno, text);
    }
    world.may(&["unpause", "-c", own("log").to_str().unwrap()]);
    // Whoever ends the next pause, and who starts the tapdisk again: it is opened with the member's rights.
    let log = own("log");
    chown(&log, Some(0), Some(0)).unwrap();
    let error = world.served.start_again(Signal::SIGKILL).unwrap_err();
    assert!(error.contains("ermission denied"), "{error}");
    world.secret_is_whole_on_disk();
}

/// Puts a link to root's file in the place of a member's image.
fn swap(world: &World, path: &Path) {
    std::fs::remove_file(path).unwrap();
    symlink(world.path("secret"), path).unwrap();
}

#[test]
fn what_a_member_has_named_is_never_opened_with_more_rights_later() {
    if !needs::root() {
        return;
    }
    // By whoever ends the pause, and by a tapdisk that is started again.
    for restart in [false, true] {
        let mut world = World::new(CONFIGURED, members_configured);
        let mine = world.path("images/own/mine");
        raw(&mine, b'm', NOBODY, 0o600);
        world.may(&["pause"]);
        world.may(&["unpause", "-a", &name("aio", &mine)]);
        world.may(&["pause"]);
        swap(&world, &mine);
        if restart {
            world.served.start_again(Signal::SIGKILL).unwrap();
        }
        refused(&world.served, &["unpause"], libc::EACCES, "ermission denied");
        world.may_not(&["unpause"], libc::EACCES, "ermission denied");
        world.secret_is_whole();
        // Root says what it is to be.
        assert_eq!(ctl(&world.served, &["unpause", "-a", &name("aio", &world.path("images/configured"))]).code, 0);
    }
}

#[test]
fn a_merge_writes_only_what_the_member_could_write() {
    if !needs::root() {
        return;
    }
    let chain = |folder: &Path| {
        let path = |name: &str| folder.join("images/own").join(name);
        good("create -n {} -s 64", &[&path("base.vhd")]);
        good("snapshot -n {} -p {}", &[&path("mid.vhd"), &path("base.vhd")]);
        write(&path("mid.vhd"), 0, 4096, b'e');
        good("snapshot -n {} -p {}", &[&path("leaf.vhd"), &path("mid.vhd")]);
        for name in ["mid.vhd", "leaf.vhd"] {
            chown(path(name), Some(NOBODY), None).unwrap();
        }
        mode(&path("base.vhd"), 0o644);
        members_configured(folder);
    };
    let world = World::new(CONFIGURED, chain);
    let leaf = name("vhd", &world.path("images/own/leaf.vhd"));
    let base = world.path("images/own/base.vhd");
    let before = std::fs::read(&base).unwrap();
    // Whoever asks: the member has named the images.
    world.may(&["pause"]);
    // A disk does not shrink to a MiB later.
    world.may(&["unpause", "-a", &leaf]);
    for as_root in [false, true] {
        match as_root {
            true => assert_eq!(ctl(&world.served, &["coalesce"]).code, 0),
            false => world.may(&["coalesce"]),
        }
        let report = wait_stage(&world.served, "failed");
        assert!(report["error"].as_str().unwrap().contains("ermission denied"), "{report}");
        assert!(std::fs::read(&base).unwrap() == before);
    }
    chown(&base, Some(NOBODY), None).unwrap();
    world.may(&["coalesce"]);
    wait_stage(&world.served, "done");
    assert!(std::fs::read(&base).unwrap() != before);
}

#[test]
fn a_merge_of_a_chain_that_root_has_named_is_done_with_the_askers_rights() {
    if !needs::root() {
        return;
    }
    let chain = |folder: &Path| {
        let path = |name: &str| folder.join("images").join(name);
        good("create -n {} -s 64", &[&path("base.vhd")]);
        good("snapshot -n {} -p {}", &[&path("mid.vhd"), &path("base.vhd")]);
        write(&path("mid.vhd"), 0, 4096, b'e');
        good("snapshot -n {} -p {}", &[&path("leaf.vhd"), &path("mid.vhd")]);
    };
    let world = World::new(&table(Path::new("{f}/images/leaf.vhd")), chain);
    let base = world.path("images/base.vhd");
    let before = std::fs::read(&base).unwrap();
    for words in [
        &["coalesce"][..],
        &[
            "commit",
            "-p",
            &world.served.pid().to_string(),
            "-m",
            "0",
            "-a",
            &name("vhd", &world.path("images/mid.vhd")),
        ],
    ] {
        world.may(words);
        let report = wait_stage(&world.served, "failed");
        assert!(report["error"].as_str().unwrap().contains("ermission denied"), "{report}");
    }
    assert!(std::fs::read(&base).unwrap() == before);
    // A member's names are looked up with the member's rights, and not by the main loop: they may lead to a file system that hangs.
    let link = world.path("images/own/mid.vhd");
    symlink("../mid.vhd", &link).unwrap();
    let (pid, image) = (world.served.pid().to_string(), name("vhd", &link));
    let words = ["commit", "-p", &pid, "-m", "0", "-a", &image];
    world.may(&words);
    wait_stage(&world.served, "failed");
    assert_eq!(ctl(&world.served, &words).code, 0);
    wait_stage(&world.served, "done");
}
