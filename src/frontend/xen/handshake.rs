//! What to do next in the handshake with a guest, from what both sides' nodes in XenStore say. No I/O.
//!
//! Whatever changed and in which order, all of it is looked at anew and compared with how far we are: so changes may
//! repeat, jump, come late or all at once (Xen's public headers `io/xenbus.h` and `io/blkif.h`).

/// `enum xenbus_state`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum XenbusState {
    /// Missing, or no such state.
    #[default]
    Unknown = 0,
    /// The node has been made.
    Initialising = 1,
    /// The backend waits for the frontend's details.
    InitWait = 2,
    /// The frontend has published its rings.
    Initialised = 3,
    /// In use.
    Connected = 4,
    /// About to close.
    Closing = 5,
    /// Closed.
    Closed = 6,
    /// Not used by block devices.
    Reconfiguring = 7,
    /// Not used by block devices.
    Reconfigured = 8,
}

impl XenbusState {
    /// From a node's value.
    pub fn parse(value: &[u8]) -> XenbusState {
        use XenbusState::*;
        const ALL: [XenbusState; 9] =
            [Unknown, Initialising, InitWait, Initialised, Connected, Closing, Closed, Reconfiguring, Reconfigured];
        super::xenbus::number(value).and_then(|number| ALL.get(number as usize).copied()).unwrap_or(Unknown)
    }
}

/// How far we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Nothing has been said to this frontend.
    Start,
    /// Offered; InitWait.
    Waiting,
    /// The rings are served; Connected.
    Connected,
    /// The frontend wants to close; the rings are still served.
    Closing,
    /// The rings are unmapped; Closed.
    Closed,
    /// The frontend's details were no good, or its ring broke; Closing, and not served.
    Failed,
}

/// The backend's nodes, which the toolstack and we write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Back {
    /// `state`
    pub state: XenbusState,
    /// `online`: the device is to stay when the frontend closes.
    pub online: bool,
    /// The hotplug script is done, or need not be waited for.
    pub hotplugged: bool,
}

/// Both sides, as they are now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// None: the directory is gone.
    pub back: Option<Back>,
    /// The frontend's `state`; none: its directory is gone.
    pub front: Option<XenbusState>,
    /// The frontend's rings are others than those that we connected to, or tried to.
    pub new_rings: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Wait for a change.
    Wait,
    /// Let go of the guest, and begin anew: the backend's directory is gone, or is another one.
    Forget,
    /// Let go of an earlier guest, say what we can do, and InitWait.
    Offer,
    /// Serve the frontend's rings, and Connected. If they are live, they have been in use already.
    Connect {
        /// Whether they have.
        live: bool,
    },
    /// Closing.
    Closing,
    /// Let go of the guest, and Closed.
    Close,
}

/// What to do next.
pub fn decide(stage: Stage, seen: &Seen) -> Act {
    use {Stage as S, XenbusState as X};
    let forget = if stage == S::Start { Act::Wait } else { Act::Forget };
    let Some(back) = seen.back else { return forget };
    if back.state == X::Initialising && stage != S::Start {
        // Somebody has made the directory anew.
        return Act::Forget;
    }
    let close = if stage == S::Closed { Act::Wait } else { Act::Close };
    // A toolstack may make the two directories one after the other.
    let early = stage == S::Start && back.online && back.state == X::Initialising;
    let Some(front) = seen.front else { return if early { Act::Wait } else { close } };
    // The toolstack takes the device away. A frontend that uses it is given the time to finish.
    let leaving = !back.online && matches!(back.state, X::Closing | X::Closed);
    match (front, stage) {
        (X::Closed, _) => close,
        (X::Closing, S::Start | S::Waiting | S::Connected) => Act::Closing,
        (X::Closing, _) => Act::Wait,
        (X::Unknown | X::Initialising | X::InitWait | X::Initialised, S::Start | S::Waiting) if leaving => Act::Close,
        (X::Unknown | X::Initialising | X::InitWait | X::Initialised, S::Start) if back.hotplugged => Act::Offer,
        (X::Initialised, S::Waiting) => Act::Connect { live: false },
        (X::Initialised, S::Connected | S::Closing | S::Failed) if seen.new_rings => Act::Connect { live: false },
        (X::Connected, S::Start | S::Waiting) => Act::Connect { live: true },
        // It has begun anew: another driver, or another kernel, in the same guest.
        (X::Initialising, S::Connected | S::Closing | S::Failed) => Act::Offer,
        (X::Initialising | X::Initialised, S::Closed) if back.online => Act::Offer,
        _ => Act::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use {Stage as S, XenbusState as X};

    const STATES: [X; 9] = [
        X::Unknown,
        X::Initialising,
        X::InitWait,
        X::Initialised,
        X::Connected,
        X::Closing,
        X::Closed,
        X::Reconfiguring,
        X::Reconfigured,
    ];
    const STAGES: [S; 6] = [S::Start, S::Waiting, S::Connected, S::Closing, S::Closed, S::Failed];

    fn back(state: X) -> Back {
        Back { state, online: true, hotplugged: true }
    }

    fn seen(back_state: X, front: X) -> Seen {
        Seen { back: Some(back(back_state)), front: Some(front), new_rings: false }
    }

    #[test]
    fn the_usual_life_of_a_device() {
        assert_eq!(decide(S::Start, &seen(X::Initialising, X::Initialising)), Act::Offer);
        assert_eq!(decide(S::Waiting, &seen(X::InitWait, X::Initialising)), Act::Wait);
        assert_eq!(decide(S::Waiting, &seen(X::InitWait, X::Initialised)), Act::Connect { live: false });
        assert_eq!(decide(S::Connected, &seen(X::Connected, X::Initialised)), Act::Wait);
        assert_eq!(decide(S::Connected, &seen(X::Connected, X::Connected)), Act::Wait);
        assert_eq!(decide(S::Connected, &seen(X::Connected, X::Closing)), Act::Closing);
        assert_eq!(decide(S::Closing, &seen(X::Closing, X::Closing)), Act::Wait);
        assert_eq!(decide(S::Closing, &seen(X::Closing, X::Closed)), Act::Close);
        assert_eq!(decide(S::Closed, &seen(X::Closed, X::Closed)), Act::Wait);
        let gone = Seen { back: None, front: None, new_rings: false };
        assert_eq!((decide(S::Closed, &gone), decide(S::Start, &gone)), (Act::Forget, Act::Wait));
    }

    #[test]
    fn a_frontend_that_is_not_there_yet_is_waited_for() {
        let early = Seen { front: None, ..seen(X::Initialising, X::Unknown) };
        assert_eq!(decide(S::Start, &early), Act::Wait);
        let late = Seen { front: None, ..seen(X::Connected, X::Unknown) };
        assert_eq!(decide(S::Start, &late), Act::Close);
    }

    #[test]
    fn the_hotplug_script_is_waited_for() {
        let waiting = Back { hotplugged: false, ..back(X::Initialising) };
        let seen = Seen { back: Some(waiting), front: Some(X::Initialising), new_rings: false };
        assert_eq!(decide(S::Start, &seen), Act::Wait);
    }

    #[test]
    fn a_guest_that_is_destroyed_is_let_go_at_once_in_every_stage() {
        for stage in STAGES.into_iter().filter(|stage| *stage != S::Closed) {
            let off = Back { online: false, ..back(X::Closing) };
            let destroyed = Seen { back: Some(off), front: None, new_rings: false };
            assert_eq!(decide(stage, &destroyed), Act::Close, "{stage:?}");
        }
        // One that never connected won't answer.
        for stage in [S::Start, S::Waiting] {
            let off = Back { online: false, ..back(X::Closing) };
            let paused = Seen { back: Some(off), front: Some(X::Initialising), new_rings: false };
            assert_eq!(decide(stage, &paused), Act::Close, "{stage:?}");
        }
        // One that uses the disk is waited for.
        let off = Back { online: false, ..back(X::Closing) };
        let used = Seen { back: Some(off), front: Some(X::Connected), new_rings: false };
        assert_eq!(decide(S::Connected, &used), Act::Wait);
    }

    #[test]
    fn a_frontend_that_begins_anew_is_offered_again_unless_the_device_goes() {
        for stage in [S::Connected, S::Closing, S::Failed, S::Closed] {
            assert_eq!(decide(stage, &seen(X::Closed, X::Initialising)), Act::Offer, "{stage:?}");
        }
        let off = Seen { back: Some(Back { online: false, ..back(X::Closed) }), ..seen(X::Closed, X::Initialising) };
        assert_eq!(decide(S::Closed, &off), Act::Wait);
        let again = Seen { new_rings: true, ..seen(X::Connected, X::Initialised) };
        assert_eq!(decide(S::Connected, &again), Act::Connect { live: false });
        assert_eq!(decide(S::Failed, &seen(X::Closing, X::Initialised)), Act::Wait, "the same rings fail again");
        for stage in [S::Waiting, S::Connected, S::Closing, S::Closed, S::Failed] {
            assert_eq!(decide(stage, &seen(X::Initialising, X::Initialising)), Act::Forget, "{stage:?}");
        }
    }

    /// Acts as the driver does, without I/O.
    fn after(act: Act, stage: S, seen: &mut Seen, fails: bool) -> S {
        let state = |seen: &mut Seen, state| {
            if let Some(back) = &mut seen.back {
                back.state = state;
            }
        };
        match act {
            Act::Wait => stage,
            Act::Forget => S::Start,
            Act::Offer => {
                state(seen, X::InitWait);
                S::Waiting
            }
            Act::Connect { .. } if fails => {
                (seen.new_rings, ()) = (false, state(seen, X::Closing));
                S::Failed
            }
            Act::Connect { .. } => {
                (seen.new_rings, ()) = (false, state(seen, X::Connected));
                S::Connected
            }
            Act::Closing => {
                state(seen, X::Closing);
                S::Closing
            }
            Act::Close => {
                state(seen, X::Closed);
                S::Closed
            }
        }
    }

    #[test]
    fn from_every_stage_and_sight_it_comes_to_rest_and_never_serves_a_guest_that_is_gone() {
        let mut sights = Vec::new();
        for front in STATES.into_iter().map(Some).chain([None]) {
            for back_state in STATES {
                for flags in 0..8 {
                    let [online, hotplugged, new_rings] = [flags & 1 != 0, flags & 2 != 0, flags & 4 != 0];
                    let back = Some(Back { state: back_state, online, hotplugged });
                    sights.push(Seen { back, front, new_rings });
                }
            }
            sights.push(Seen { back: None, front, new_rings: false });
        }
        for sight in sights {
            for first in STAGES {
                for fails in [false, true] {
                    let (mut stage, mut seen, mut steps) = (first, sight, 0);
                    loop {
                        let act = decide(stage, &seen);
                        if act == Act::Wait {
                            break;
                        }
                        stage = after(act, stage, &mut seen, fails);
                        steps += 1;
                        assert!(steps < 6, "{first:?} {sight:?} does not come to rest");
                    }
                    if seen.back.is_none() || seen.front.is_none() || seen.front == Some(X::Closed) {
                        assert!(matches!(stage, S::Start | S::Closed), "{first:?} {sight:?} ends as {stage:?}");
                    }
                }
            }
        }
    }
}
