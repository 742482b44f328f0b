//! Places for a frontend's clients. The requests of a client that has left still use its memory, and are answered to its place: so that is
//! free when all of them have ended.

/// A place.
#[derive(Debug)]
struct Seat<C> {
    client: Option<C>,
    /// Requests of a client that has left.
    orphans: usize,
}

/// All places.
#[derive(Debug)]
pub(super) struct Seats<C>(Vec<Seat<C>>);

/// Why there is no place for a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Full {
    /// There is a client at each.
    Clients,
    /// Clients have left, but not all of their requests have ended. That ends by itself, so that the next client can wait.
    Orphans,
}

impl<C> Seats<C> {
    /// So many places.
    pub(super) fn new(count: usize) -> Seats<C> {
        Seats((0..count).map(|_| Seat { client: None, orphans: 0 }).collect())
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// How many are free; at least one.
    pub(super) fn free(&self) -> Result<usize, Full> {
        let vacant = self.0.iter().filter(|seat| seat.client.is_none());
        match vacant.clone().filter(|seat| seat.orphans == 0).count() {
            0 if vacant.count() > 0 => Err(Full::Orphans),
            0 => Err(Full::Clients),
            free => Ok(free),
        }
    }

    /// The first one that is free.
    pub(super) fn first_free(&self) -> Option<usize> {
        self.0.iter().position(|seat| seat.client.is_none() && seat.orphans == 0)
    }

    /// Gives a client a place that is free.
    pub(super) fn seat(&mut self, index: usize, client: C) {
        self.0[index].client = Some(client);
    }

    /// The client at a place.
    pub(super) fn get_mut(&mut self, index: usize) -> Option<&mut C> {
        self.0.get_mut(index)?.client.as_mut()
    }

    /// The clients, with their places.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &C)> {
        self.0.iter().enumerate().filter_map(|(index, seat)| Some((index, seat.client.as_ref()?)))
    }

    /// The same.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (usize, &mut C)> {
        self.0.iter_mut().enumerate().filter_map(|(index, seat)| Some((index, seat.client.as_mut()?)))
    }

    /// Takes a client away, which has so many requests `in_flight`.
    pub(super) fn leave(&mut self, index: usize, in_flight: impl FnOnce(&C) -> usize) -> Option<C> {
        let client = self.0[index].client.take()?;
        self.0[index].orphans = in_flight(&client);
        Some(client)
    }

    /// A request of a place's client has ended: whose it is. None: it has left.
    pub(super) fn ended(&mut self, index: usize) -> Option<&mut C> {
        let seat = self.0.get_mut(index)?;
        if seat.client.is_none() {
            debug_assert!(seat.orphans > 0, "each request ends once");
            seat.orphans = seat.orphans.saturating_sub(1);
        }
        seat.client.as_mut()
    }

    /// Whether the client at a place has left.
    pub(super) fn has_left(&self, index: usize) -> bool {
        self.0.get(index).is_none_or(|seat| seat.client.is_none())
    }

    /// Requests of clients that have left.
    pub(super) fn orphans(&self) -> usize {
        self.0.iter().map(|seat| seat.orphans).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_nobodys_until_the_last_request_of_who_left_has_ended() {
        let mut seats = Seats::new(2);
        seats.seat(0, 'a');
        assert_eq!((seats.free(), seats.first_free()), (Ok(1), Some(1)));
        seats.seat(1, 'b');
        assert_eq!((seats.free(), seats.first_free()), (Err(Full::Clients), None));
        assert_eq!(seats.ended(0), Some(&mut 'a'));
        assert_eq!((seats.leave(0, |_| 2), seats.leave(0, |_| 9)), (Some('a'), None));
        for left in [2, 1] {
            assert_eq!((seats.free(), seats.first_free(), seats.orphans()), (Err(Full::Orphans), None, left));
            assert_eq!((seats.has_left(0), seats.has_left(1)), (true, false));
            assert_eq!(seats.ended(0), None);
        }
        assert_eq!((seats.free(), seats.first_free(), seats.orphans()), (Ok(1), Some(0), 0));
    }
}
