//! What each 512-byte sector of a disk may hold, where requests overlap and complete in any order.
//!
//! A sector is filled with the number of the write that wrote it, word by word; 0 is a sector that was zeroed or never
//! written. A word that is read must be of a write that had been begun, and that no other write had wholly replaced
//! before the read began: one that was begun after the first had completed, and that completed before the read began.

pub const SECTOR: u64 = 512;

/// A moment: the count of requests that were begun or completed so far.
pub type Moment = u64;

#[derive(Clone, Copy, Debug)]
struct Value {
    number: u64,
    begun: Moment,
    completed: Option<Moment>,
    /// From then on nobody may read it any more.
    replaced: Option<Moment>,
}

#[derive(Debug)]
pub struct Model {
    sectors: Vec<Vec<Value>>,
    now: Moment,
}

impl Model {
    pub fn new(size: u64) -> Model {
        let zero = Value { number: 0, begun: 0, completed: Some(0), replaced: None };
        Model { sectors: vec![vec![zero]; (size / SECTOR) as usize], now: 0 }
    }

    fn range(offset: u64, len: u64) -> std::ops::Range<usize> {
        (offset / SECTOR) as usize..((offset + len) / SECTOR) as usize
    }

    /// A request begins.
    pub fn begin(&mut self) -> Moment {
        self.now += 1;
        self.now
    }

    /// A write of `number` begins.
    pub fn begin_write(&mut self, number: u64, offset: u64, len: u64) -> Moment {
        let begun = self.begin();
        for sector in &mut self.sectors[Self::range(offset, len)] {
            sector.push(Value { number, begun, completed: None, replaced: None });
        }
        begun
    }

    /// The write that began then has succeeded. `surely`: nothing that was there before can be there any more; a discard
    /// need not have an effect.
    pub fn end_write(&mut self, begun: Moment, surely: bool, offset: u64, len: u64) {
        let now = self.begin();
        for sector in &mut self.sectors[Self::range(offset, len)] {
            for value in sector.iter_mut() {
                if value.begun == begun {
                    value.completed = Some(now);
                } else if surely
                    && value.replaced.is_none()
                    && value.completed.is_some_and(|completed| completed < begun)
                {
                    value.replaced = Some(now);
                }
            }
        }
    }

    /// Forgets what nobody can read any more. Nothing is in flight.
    pub fn settle(&mut self) {
        for sector in &mut self.sectors {
            sector.retain(|value| value.replaced.is_none());
        }
    }

    /// What was read from `offset` on by a read that began then. Gives what is wrong.
    pub fn check(&self, begun: Moment, offset: u64, data: &[u8]) -> Result<(), String> {
        for (i, bytes) in data.chunks(SECTOR as usize).enumerate() {
            let at = offset + i as u64 * SECTOR;
            let sector = &self.sectors[(at / SECTOR) as usize];
            for word in bytes.chunks(8) {
                let number = u64::from_le_bytes(word.try_into().unwrap());
                let valid = |value: &Value| value.number == number && value.replaced.is_none_or(|at| at > begun);
                if !sector.iter().any(valid) {
                    return Err(format!("byte {at}: read {number:#x}, begun at {begun}; possible: {sector:?}"));
                }
            }
        }
        Ok(())
    }
}

/// A buffer filled as the model wants it.
pub fn pattern(number: u64, len: u64) -> Vec<u8> {
    number.to_le_bytes().repeat((len / 8) as usize)
}
