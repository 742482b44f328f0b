//! Whose a request is.

/// Whose a request is: it says who is told of its end, and between whom a filter has to be fair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A client's, which came by the frontend of that index.
    Frontend(u16),
    /// The disk's own, such as the flush before an image is closed. Nobody may hold it back for the sake of others.
    Disk,
    /// The metadata of the layer of that index, 0 being the one that is asked first.
    Layer(u16),
}
