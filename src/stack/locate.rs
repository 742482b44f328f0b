//! Where a disk has data, as far as its layers know.

use drivers::{Ask, Extent, Plan, Through};

use super::{Stack, Started, errno};
use crate::request::{RequestId, Slots};

impl Stack {
    /// Says which parts of a range have data. It ends where that is not known without waiting, if something is known.
    pub(super) fn status(&mut self, id: RequestId, slots: &mut Slots) -> Started {
        let (offset, len, origin) = (slots.get(id).offset, slots.get(id).len, slots.get(id).origin);
        let words = slots.get(id).payload.len() / 8;
        let (mut at, mut word, mut data, mut run) = (0, 0, true, 0_u64);
        let put = |slots: &Slots, word: u64, run: u64| slots.get(id).payload.put(word * 8, &run.to_ne_bytes());
        while at < len && word < words {
            let extent = Extent { offset: offset + at, len: len - at };
            let mut ask = Ask { op: drivers::Op::Locate, extent, origin, begins: true, now: self.time };
            let mut plan = self.layers[self.first].layer.plan(&ask);
            self.walk(&mut ask, self.first, &mut plan);
            let (here, count) = match plan {
                Plan::Data { count, .. } | Plan::Through(Through { count, .. }) => (true, count),
                Plan::Zeros { count, .. } => (false, count),
                Plan::Wait { .. } if at > 0 => break,
                Plan::Wait { until } => {
                    self.wait(until);
                    return Started::Waits;
                }
                Plan::Fail(why) => {
                    slots.get_mut(id).error = Some(errno(why));
                    return Started::Planned;
                }
                Plan::Below { .. } | Plan::Both { .. } => unreachable!("the walk ends with none of these"),
            };
            if here != data {
                put(slots, word, run);
                (word, data, run) = (word + 1, here, 0);
            }
            run += count;
            at += count;
        }
        if word < words {
            put(slots, word, run);
            put(slots, word + 1, 0);
        }
        slots.get_mut(id).planned = len;
        Started::Planned
    }
}
