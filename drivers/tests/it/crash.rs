//! Images that are cut off at any moment: what was answered as flushed is there, the rest is old or new, and no sector has
//! another's data.

use crate::common::Where;
use crate::common::guest::{Guest, Setup};
use crate::common::medium::Cut;
use drivers::Durability;
use drivers::vhd::Kind;

const KINDS: [(Kind, Where); 4] = [
    (Kind::Dynamic, Where::File),
    (Kind::Dynamic, Where::Device),
    (Kind::Differencing, Where::File),
    (Kind::Differencing, Where::Device),
];

fn setup((kind, on): (Kind, Where), durability: Durability) -> Setup {
    Setup { kind, on, durability, blocks: 300, block_size: 8192, faults: 0 }
}

/// Runs until there were so many cuts, and gives the first loss.
fn run(setup: Setup, cut: Cut, cuts: u64, seed: u64) -> Result<(), String> {
    let mut done = 0;
    for seed in seed.. {
        let mut guest = Guest::new(setup, seed);
        for step in 0..1500 {
            guest.step();
            let left = guest.cut(cut).map_err(|error| format!("{setup:?} seed {seed} step {step}: {error}"))?;
            if step % 50 == 0 {
                guest.restart(left);
            }
        }
        done += guest.cuts;
        if done >= cuts {
            break;
        }
    }
    Ok(())
}

#[test]
#[ignore = "slow"]
fn a_power_cut_loses_nothing_that_was_flushed() {
    for kind in KINDS {
        run(setup(kind, Durability::Flush), Cut::Power, 13_000, 1).unwrap();
    }
}

#[test]
#[ignore = "slow"]
fn a_killed_process_loses_nothing_that_was_answered() {
    for kind in KINDS {
        for durability in [Durability::Order, Durability::Flush] {
            run(setup(kind, durability), Cut::Kill, 6_500, 1000).unwrap();
        }
    }
}

#[test]
fn without_flushes_a_power_cut_loses_data_and_this_test_sees_it() {
    for kind in [KINDS[1], KINDS[2], KINDS[3]] {
        let outcome = std::panic::catch_unwind(|| run(setup(kind, Durability::Order), Cut::Power, 10_000, 1));
        assert!(!matches!(outcome, Ok(Ok(()))), "{kind:?}");
    }
}

#[test]
fn failed_writes_leave_old_or_new_and_nothing_hangs() {
    for kind in KINDS {
        for durability in [Durability::Order, Durability::Flush] {
            let setup = Setup { faults: 20, ..setup(kind, durability) };
            let cut = if durability == Durability::Flush { Cut::Power } else { Cut::Kill };
            run(setup, cut, 1000, 7).unwrap();
            let mut guest = Guest::new(setup, 77);
            (0..20_000).for_each(|_| guest.step());
            assert_eq!(guest.drain().len(), 0, "{setup:?}: writes that nobody answers");
        }
    }
}

#[test]
fn a_full_device_refuses_and_keeps_what_it_has() {
    let setup = setup(KINDS[3], Durability::Flush);
    let mut guest = Guest::new(setup, 5);
    (0..60_000).for_each(|_| guest.step());
    assert!(guest.out_of_space > 100, "it is not full: {}", guest.out_of_space);
    assert_eq!(guest.drain().len(), 0);
    guest.cut(Cut::Power).unwrap();
}
