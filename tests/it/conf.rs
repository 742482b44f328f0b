//! The example configurations are valid, and the reference shows every key with its default.

use std::path::Path;

use tapdisk::config::Config;

#[test]
fn every_example_is_valid() {
    let mut seen = 0;
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("conf")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            Config::load(&path).unwrap();
            seen += 1;
        }
    }
    assert!(seen >= 6, "only {seen}");
}

#[test]
fn the_reference_says_the_defaults() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("conf/reference.toml");
    let minimal = "[image]\npath = '/srv/vm/disk.img'\n[frontend.local]\nsocket = '/run/tapdisk/ring.sock'\n\
                   [frontend.vhost_user]\nsocket = '/run/tapdisk/vhost-user.sock'\n\
                   [frontend.nbd]\nsocket = '/run/tapdisk/nbd.sock'\n[frontend.xen]\ndomain = 1\n\
                   device = 'xvda'\n";
    let reference = Config { file: None, ..Config::load(&path).unwrap() };
    assert_eq!(reference, Config::parse(minimal, &path).unwrap());
    let text = std::fs::read_to_string(&path).unwrap();
    // What is commented out of [[fault]] is valid too.
    let (_, faults) = text.split_once("# [[fault]]").unwrap();
    let lines = faults.lines().filter(|line| line.contains(" = ") && !line.starts_with("#  "));
    let table: String = lines.map(|line| line.trim_start_matches("# ").to_owned() + "\n").collect();
    let with_fault = format!("{minimal}[[fault]]\n{table}");
    assert_eq!(Config::parse(&with_fault, &path).unwrap().faults.len(), 1, "{table}");
    let (_, throttle) = text.split_once("# [throttle.read]\n").unwrap();
    let lines = throttle.lines().take_while(|line| !line.is_empty()).filter(|line| !line.starts_with("#  "));
    let table: String = lines.map(|line| line.trim_start_matches("# ").to_owned() + "\n").collect();
    for of in ["read", "write", "all"] {
        let limits = Config::parse(&format!("{minimal}[throttle.{of}]\n{table}"), &path).unwrap().throttle.values();
        assert_eq!(limits.iter().flatten().count(), 4, "{table}");
    }
    for key in ["size", "create", "changed_blocks", "sector_size", "listen", "file", "store", "socket", "serial"] {
        assert!(text.contains(&format!("# {key} = ")), "{key} has no default, and is not in the reference");
    }
}

/// The functions of a source that are tests, after `#[test]` and what else is said of them.
fn tests_in(folder: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            tests_in(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let tests = text.split("#[test]").skip(1).filter_map(|test| test.split_once("fn ")?.1.split_once('('));
            found.extend(tests.map(|(name, _)| name.to_owned()));
        }
    }
}

#[test]
fn each_promise_of_the_page_on_security_has_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut there = Vec::new();
    for folder in ["src", "tests/it", "tests/alone", "drivers/src", "drivers/tests"] {
        tests_in(&root.join(folder), &mut there);
    }
    let page = std::fs::read_to_string(root.join("docs/security.md")).unwrap();
    let (promises, _) = page.split_once("## What is not promised").unwrap();
    let mut count = 0;
    // Names in back quotes that no key or program could have.
    for name in promises.split('`').filter(|name| name.matches('_').count() > 2 && !name.contains([' ', '|'])) {
        assert!(there.iter().any(|test| test == name), "there is no test {name}");
        count += 1;
    }
    assert!(count > 40, "only {count}");
}
