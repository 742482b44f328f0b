use super::*;

fn error(text: &str) -> String {
    Config::parse(text, Path::new("disk.toml")).unwrap_err().to_string()
}

fn parse(text: &str) -> Config {
    Config::parse(text, Path::new("disk.toml")).unwrap()
}

#[test]
fn the_image_alone_is_a_configuration_and_all_of_it_is_printed() {
    let config = parse("[image]\npath = \"a.img\"\n[frontend.local]\nsocket = \"s\"\n");
    let printed = config.to_toml();
    assert_eq!(parse(&printed), config, "{printed}");
    for key in ["depth = 128", "submit = \"auto\"", "merge_bytes = \"1 MiB\"", "max_queues = 4", "lock = true"] {
        assert!(printed.contains(key), "{key} in {printed}");
    }
}

#[test]
fn a_wrong_key_is_named_with_its_line_and_what_was_expected() {
    let cases = [
        ("[image]\npath = \"a\"\nreadonly = true", "disk.toml:3: ", "unknown field `readonly`, expected one of"),
        ("[image]\npath = \"a\"\n[engine]\ndepth = 0", "disk.toml:4: engine.depth: ", "an integer from 1 to 65536"),
        (
            "[image]\npath = \"a\"\n[engine]\ndepth = \"x\"",
            "disk.toml:4: engine.depth: ",
            "an integer from 1 to 65536",
        ),
        ("[image]\npath = \"a\"\nsector_size = 1024", "disk.toml:3: image.sector_size: ", "512 or 4096"),
        ("[image]\npath = 3", "disk.toml:2: image.path: ", "expected"),
        ("[image]\npath = \"a\"\ndirect = \"yes\"", "disk.toml:3: image.direct: ", "`auto`, `on`"),
        ("[image]\npath = \"a\"\n[log]\nlevel = \"loud\"", "disk.toml:4: log.level: ", "\"warning\""),
        ("[image]\npath = \"a\"\ncreate = \"1 GX\"", "disk.toml:3: image.create: ", "64 KiB"),
        ("[image]\npath = \"a\"\n\ncreate = 513", "disk.toml:4: image.create: ", "512-byte sector"),
        (
            "[image]\ntype = \"ram\"\nsize = 512\nchanged_blocks = \"/log\"",
            "disk.toml:4: image.changed_blocks: ",
            "nothing of them lasts",
        ),
        ("[image]\npath = \"a\"\nchanged_blocks = \"\"", "disk.toml:3: image.changed_blocks: ", "cbt-util create"),
        ("# c\n[image]\ntype = \"ram\"", "disk.toml:2: image.size: ", "missing"),
        (
            "[image]\npath = \"a\"\n[frontend.nbd]\nlisten = \"10.0.0.1:1\"",
            "disk.toml:4: frontend.nbd.listen: ",
            "loopback",
        ),
        ("[image]\npath = \"a\"\n[frontend.nbd]\n", "disk.toml:3: frontend.nbd: ", "a socket"),
        (
            "[image]\npath = \"a\"\n[engine]\nthreads_max = 3\nthreads_min = 4",
            "disk.toml:4: engine.threads_max: ",
            "at least",
        ),
        ("[image]\npath = \"a\"\n[memory]\noom_score_adj = -1001", "disk.toml:4: memory.oom", "from -1000 to 1000"),
        (
            "[image]\npath = \"a\"\n[[fault]]\ntype = \"error\"\nerrno = \"EFOO\"",
            "disk.toml:5: fault[0].errno",
            "one of EIO,",
        ),
        (
            "[image]\npath = \"a\"\n[[fault]]\ntype = \"error\"\nrate = 1.5",
            "disk.toml:5: fault[0].rate",
            "0.0 to 1.0",
        ),
        ("[image]\npath = \"a\"\n[[fault]]\ntype = \"delay\"", "disk.toml:3: fault: ", "a delay needs us"),
        ("[image\n", "disk.toml:1: syntax: ", "expected"),
        ("requests = 1", "disk.toml:1: image.path: ", "missing"),
    ];
    wrong(&cases);
}

fn wrong(cases: &[(&str, &str, &str)]) {
    for (text, place, expected) in cases.iter().copied() {
        let message = error(text);
        assert!(message.starts_with(place) && message.contains(expected), "{text:?} gave {message:?}");
    }
}

#[test]
fn limits_that_make_no_sense_are_refused_with_the_remedy() {
    let cases = [
        (
            "[image]\npath = \"a\"\n[throttle.read]\nbytes_per_s = 0",
            "disk.toml:4: throttle.read.bytes_per_s: ",
            "from \"512\" to \"1 TiB\" a second; no limit: leave it out",
        ),
        (
            "[image]\npath = \"a\"\n[throttle.all]\nrequests_per_s = 10000000000",
            "disk.toml:4: throttle.all.requests_per_s: ",
            "from 1 to 1000000000 a second",
        ),
        (
            "[image]\npath = \"a\"\n[throttle.write]\nrequests_per_s = -1",
            "disk.toml:4: throttle.write.requests_per_s: ",
            "an integer from 0",
        ),
        (
            "[image]\npath = \"a\"\n[throttle.write]\nrequests_per_s = 1000\nrequests_burst = 19",
            "disk.toml:5: throttle.write.requests_burst: ",
            "from 20, a fiftieth of a second's, without which the rate is not reached, to 1000000000; a tenth of a second's: leave it out",
        ),
        (
            "[image]\npath = \"a\"\n[throttle.all]\nbytes_burst = \"1 MiB\"",
            "disk.toml:4: throttle.all.bytes_burst: ",
            "set throttle.all.bytes_per_s too",
        ),
        ("[image]\npath = \"a\"\n[throttle.reads]\n", "disk.toml:3: throttle", "unknown field `reads`"),
    ];
    wrong(&cases);
}

#[test]
fn limits_are_what_the_throttle_gets_and_what_it_has_is_told() {
    let text = "[image]\npath = 'a'\n[throttle.read]\nbytes_per_s = \"100MiB\"\nbytes_burst = \"200MiB\"\nrequests_per_s = 500\n\
                requests_burst = 1000\n[throttle.all]\nrequests_per_s = 7\n";
    let config = parse(text);
    let mib = 1 << 20;
    let values = [Some(100 * mib), Some(200 * mib), Some(500), Some(1000)];
    let values = [values.as_slice(), &[None; 6], &[Some(7), None]].concat();
    assert_eq!(config.throttle.values().as_slice(), values);
    assert_eq!(Throttle::from(config.throttle.limits()), config.throttle);
    let mut set = Throttle::default();
    values.iter().enumerate().for_each(|(key, value)| set.set(key, *value));
    assert_eq!(set, config.throttle);
    assert!(Throttle::default().is_none() && Throttle::default().check().is_ok() && !set.is_none());
    assert_eq!(parse(&config.to_toml()), config);
    // Keys are those of the file.
    for (key, value) in Throttle::KEYS.iter().zip(config.throttle.values()) {
        let name = key.rsplit('.').next().unwrap();
        assert_eq!(
            value.is_some(),
            config
                .to_toml()
                .split(&format!("[{}]", key.rsplit_once('.').unwrap().0))
                .nth(1)
                .is_some_and(|table| table.split("\n[").next().unwrap().contains(&format!("\n{name} = "))),
            "{key}"
        );
    }
}

#[test]
fn sizes_are_binary() {
    let size = |text: &str| text.parse::<Size>().map(|size| size.0);
    assert_eq!(size("512"), Ok(512));
    assert_eq!(size("64 KiB"), Ok(65536));
    assert_eq!(size("64k"), Ok(65536));
    assert_eq!(size("1.5 GiB"), Ok(3 << 29));
    assert_eq!(size("2T"), Ok(2 << 40));
    for wrong in ["", "KiB", "1.0001K", "-1", "1 GX", "99999999T", "1e3", "iB"] {
        assert!(size(wrong).is_err(), "{wrong}");
    }
    assert_eq!(Size(3 << 29).to_string(), "1536 MiB");
}
