//! Every option, malformed ones, and any cut of the stream.

use super::*;
use crate::frontend::nbd::wire::OPT_STARTTLS;

fn export(read_only: bool) -> Arc<Export> {
    let disk =
        DiskInfo { size: 1 << 30, sector_size: 512, physical_sector_size: 512, read_only, name: "aio:/x".into() };
    Arc::new(Export { name: "disk".into(), disk })
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let length = U32::new(data.len() as u32);
    let head = OptionHead { magic: OPTION_MAGIC, option: U32::new(option), length };
    [head.as_bytes(), data].concat()
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

fn go(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend((infos.len() as u16).to_be_bytes());
    infos.iter().for_each(|info| data.extend(info.to_be_bytes()));
    data
}

fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| data.extend(string(query)));
    data
}

/// All that a client sends after its flags, and what it gets, without the greeting.
fn talk(flags: u32, options: &[Vec<u8>]) -> (Vec<u8>, Step) {
    let mut out = Vec::new();
    let mut negotiation = Negotiation::new(export(false), &mut out);
    assert_eq!(out, b"NBDMAGICIHAVEOPT\0\x03");
    out.clear();
    let input = [&flags.to_be_bytes()[..], &options.concat()].concat();
    let (taken, step) = negotiation.feed(&input, &mut out);
    assert!(step != Step::Continue || taken == input.len());
    (out, step)
}

/// The replies to options: kind and data of each.
fn replies(mut bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let mut all = Vec::new();
    while let Some(head) = take::<OptionReplyHead>(&mut bytes) {
        assert_eq!(head.magic.get(), OPTION_REPLY_MAGIC);
        let (data, rest) = bytes.split_at(head.length.get() as usize);
        all.push((head.kind.get(), data.to_vec()));
        bytes = rest;
    }
    assert!(bytes.is_empty());
    all
}

/// The kinds of the replies to one option after a structured-reply option, and where that ends.
fn kinds(number: u32, data: &[u8]) -> (Vec<u32>, Step) {
    let (out, step) = talk(3, &[option(OPT_STRUCTURED_REPLY, &[]), option(number, data)]);
    let mut kinds: Vec<u32> = replies(&out).into_iter().map(|(kind, _)| kind).collect();
    assert_eq!(kinds.remove(0), REP_ACK);
    (kinds, step)
}

#[test]
fn export_name_ends_in_the_old_answer_with_or_without_its_zeros() {
    let flags = FLAG_HAS_FLAGS
        | FLAG_SEND_FLUSH
        | FLAG_SEND_FUA
        | FLAG_SEND_TRIM
        | FLAG_SEND_WRITE_ZEROES
        | FLAG_CAN_MULTI_CONN;
    let head = [&(1_u64 << 30).to_be_bytes()[..], &flags.to_be_bytes()].concat();
    let done = Step::Transmission(Session::default());
    assert_eq!(talk(3, &[option(OPT_EXPORT_NAME, b"disk")]), (head.clone(), done));
    assert_eq!(talk(0, &[option(OPT_EXPORT_NAME, b"")]), ([&head[..], &[0; 124]].concat(), done));
    assert_eq!(talk(3, &[option(OPT_EXPORT_NAME, b"other")]), (vec![], Step::Close));
}

#[test]
fn without_fixed_newstyle_there_is_only_export_name() {
    assert_eq!(talk(2, &[option(OPT_LIST, &[])]), (vec![], Step::Close));
    assert_eq!(talk(4, &[option(OPT_LIST, &[])]).1, Step::Close);
}

#[test]
fn go_tells_the_size_and_what_was_asked_for() {
    let (out, step) = talk(3, &[option(OPT_GO, &go("disk", &[INFO_NAME, INFO_DESCRIPTION, 77]))]);
    assert_eq!(step, Step::Transmission(Session::default()));
    let infos = replies(&out);
    assert_eq!(infos[0].1[..10], [&[0, 0][..], &(1_u64 << 30).to_be_bytes()].concat());
    assert_eq!(infos[1].1, [0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0]);
    assert_eq!(infos[2].1, b"\0\x01disk");
    assert_eq!(infos[3].1, b"\0\x02aio:/x");
    assert_eq!(infos.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), [3, 3, 3, 3, REP_ACK]);
}

#[test]
fn info_is_go_without_going_and_a_bad_name_leaves_the_client_there() {
    assert_eq!(kinds(OPT_INFO, &go("", &[])), (vec![REP_INFO, REP_INFO, REP_ACK], Step::Continue));
    for number in [OPT_INFO, OPT_GO] {
        assert_eq!(kinds(number, &go("other", &[])), (vec![REP_ERR_UNKNOWN], Step::Continue));
    }
    let session = Session { structured: true, block_status: false };
    assert_eq!(kinds(OPT_GO, &go("", &[])).1, Step::Transmission(session));
}

#[test]
fn a_read_only_disk_offers_nothing_that_writes() {
    let flags = export(true).flags(true);
    assert_eq!(flags & FLAG_READ_ONLY, FLAG_READ_ONLY);
    assert_eq!(flags & (FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES), 0);
    assert_eq!((flags & FLAG_SEND_DF, export(true).flags(false) & FLAG_SEND_DF), (FLAG_SEND_DF, 0));
}

#[test]
fn list_names_the_one_export() {
    let (out, _) = talk(1, &[option(OPT_LIST, &[])]);
    let expected = [(REP_SERVER, b"\0\0\0\x04diskaio:/x".to_vec()), (REP_ACK, vec![])];
    assert_eq!(replies(&out), expected);
    assert_eq!(kinds(OPT_LIST, b"x").0, [REP_ERR_INVALID]);
}

#[test]
fn abort_is_acknowledged_and_ends_it() {
    assert_eq!(kinds(OPT_ABORT, &[]), (vec![REP_ACK], Step::Close));
}

#[test]
fn what_is_not_known_is_refused_and_the_client_goes_on() {
    for number in [OPT_STARTTLS, 4, 11, 0, u32::MAX] {
        assert_eq!(kinds(number, b"abc"), (vec![REP_ERR_UNSUP], Step::Continue));
    }
}

#[test]
fn malformed_data_is_invalid() {
    assert_eq!(kinds(OPT_STRUCTURED_REPLY, b"x").0, [REP_ERR_INVALID]);
    let good = go("disk", &[INFO_NAME]);
    for cut in 0..good.len() {
        assert_eq!(kinds(OPT_GO, &good[..cut]), (vec![REP_ERR_INVALID], Step::Continue), "{cut}");
    }
    assert_eq!(kinds(OPT_GO, &[&good[..], &[0, 0]].concat()).0, [REP_ERR_INVALID]);
    let good = contexts("disk", &["base:allocation", "x:"]);
    for cut in 0..good.len() {
        assert_eq!(kinds(OPT_SET_META_CONTEXT, &good[..cut]).0, [REP_ERR_INVALID], "{cut}");
    }
    assert_eq!(kinds(OPT_SET_META_CONTEXT, &[&good[..], &[0; 4]].concat()).0, [REP_ERR_INVALID]);
    assert_eq!(kinds(OPT_GO, &[&5000_u32.to_be_bytes()[..], &[b'x'; 5002]].concat()).0, [REP_ERR_INVALID]);
}

#[test]
fn contexts_are_chosen_by_name_and_listed_by_namespace() {
    let list = |queries: &[&str]| kinds(OPT_LIST_META_CONTEXT, &contexts("", queries)).0;
    assert_eq!(list(&[]), [REP_META_CONTEXT, REP_ACK]);
    assert_eq!(list(&["qemu:", "base:"]), [REP_META_CONTEXT, REP_ACK]);
    assert_eq!(list(&["qemu:"]), [REP_ACK]);
    let set = |queries: &[&str]| {
        let go = option(OPT_GO, &go("", &[]));
        let set = option(OPT_SET_META_CONTEXT, &contexts("disk", queries));
        talk(3, &[option(OPT_STRUCTURED_REPLY, &[]), set, go]).1
    };
    let session = |block_status| Step::Transmission(Session { structured: true, block_status });
    assert_eq!(set(&["x:y", BASE_ALLOCATION]), session(true));
    assert_eq!(set(&["base:"]), session(false));
    assert_eq!(set(&[]), session(false));
    assert_eq!(kinds(OPT_SET_META_CONTEXT, &contexts("other", &[])).0, [REP_ERR_UNKNOWN]);
}

#[test]
fn a_later_choice_replaces_an_earlier_one_also_when_it_fails() {
    let set = |data: &[u8]| option(OPT_SET_META_CONTEXT, data);
    let (_, step) = talk(
        3,
        &[
            option(OPT_STRUCTURED_REPLY, &[]),
            set(&contexts("", &[BASE_ALLOCATION])),
            set(b"junk"),
            option(OPT_GO, &go("", &[])),
        ],
    );
    assert_eq!(step, Step::Transmission(Session { structured: true, block_status: false }));
}

#[test]
fn contexts_need_structured_replies_first() {
    let (out, _) = talk(3, &[option(OPT_SET_META_CONTEXT, &contexts("", &[BASE_ALLOCATION]))]);
    assert_eq!(replies(&out)[0].0, REP_ERR_INVALID);
}

#[test]
fn a_long_option_is_thrown_away_and_a_hopeless_one_ends_it() {
    let long = option(OPT_LIST, &vec![7; MAX_OPTION as usize + 1]);
    let (out, step) = talk(3, &[long, option(OPT_ABORT, &[])]);
    let kinds: Vec<u32> = replies(&out).into_iter().map(|(kind, _)| kind).collect();
    assert_eq!((kinds, step), (vec![REP_ERR_TOO_BIG, REP_ACK], Step::Close));
    assert_eq!(talk(3, &[option(OPT_EXPORT_NAME, &vec![7; MAX_OPTION as usize + 1])]).1, Step::Close);
    let head = OptionHead { magic: OPTION_MAGIC, option: U32::new(OPT_LIST), length: U32::new(u32::MAX) };
    assert_eq!(talk(3, &[head.as_bytes().to_vec()]), (vec![], Step::Close));
}

#[test]
fn nobody_asks_for_ever() {
    let options = vec![option(99, &[]); MAX_OPTIONS as usize];
    assert_eq!(talk(3, &options).1, Step::Continue);
    let options = vec![option(99, &[]); MAX_OPTIONS as usize + 1];
    assert_eq!(talk(3, &options).1, Step::Close);
}

#[test]
fn a_wrong_magic_ends_it() {
    let mut list = option(OPT_LIST, &[]);
    list[0] ^= 1;
    assert_eq!(talk(3, &[list]), (vec![], Step::Close));
}

#[test]
fn byte_by_byte_gives_the_same_and_leaves_what_is_not_its_own() {
    let input = [
        3_u32.to_be_bytes().to_vec(),
        option(OPT_STRUCTURED_REPLY, &[]),
        option(OPT_LIST, &vec![1; MAX_OPTION as usize + 9]),
        option(OPT_SET_META_CONTEXT, &contexts("disk", &[BASE_ALLOCATION])),
        option(OPT_GO, &go("disk", &[INFO_NAME])),
        b"request".to_vec(),
    ]
    .concat();
    let mut whole = Vec::new();
    let (taken, step) = Negotiation::new(export(false), &mut whole).feed(&input, &mut whole);
    assert_eq!(
        (&input[taken..], step),
        (&b"request"[..], { Step::Transmission(Session { structured: true, block_status: true }) })
    );
    let mut bytewise = Vec::new();
    let mut negotiation = Negotiation::new(export(false), &mut bytewise);
    let (mut from, mut last) = (0, Step::Continue);
    for to in 1..=input.len() {
        let (taken, step) = negotiation.feed(&input[from..to], &mut bytewise);
        (from, last) = (from + taken, step);
    }
    assert_eq!((from, last, bytewise), (taken, step, whole));
}

#[test]
fn garbage_never_panics_and_never_floods() {
    let mut random: u64 = 88_172_645_463_325_252;
    for round in 0..2000 {
        let mut out = Vec::new();
        let mut negotiation = Negotiation::new(export(false), &mut out);
        let mut input = 3_u32.to_be_bytes().to_vec();
        for _ in 0..20 {
            let mut data = vec![0; (round % 60) as usize];
            for byte in &mut data {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                *byte = if random & 0x300 == 0 { random as u8 } else { 0 };
            }
            input.extend(option((random >> 20) as u32 % 12, &data));
        }
        let (taken, _) = negotiation.feed(&input, &mut out);
        assert!(taken <= input.len() && out.len() < 16_384);
    }
}
