//! A layer as qcow2's will be, with clusters that are shared, packed or encrypted: the least that has all of it.

use std::collections::VecDeque;

use drivers::{Ask, Extent, Layer, Meta, MetaId, MetaOp, Op, Plan, Settled, Through, Ticket};

use super::FILE;

/// Bytes of a cluster.
pub(super) const CLUSTER: u64 = 4096;

/// Where the table is in the file: one sector for each cluster, whose first byte says that it is there.
const TABLE: u64 = 0;

/// Of what gives space back.
const FREED: MetaId = MetaId(99);

/// Marks of what is read or written through memory.
const PLAIN: u64 = 0;
const PACKED: u64 = 1;

/// Where a cluster's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    /// Not here.
    Nowhere,
    /// It reads as zeros, whatever is below.
    Zero,
    /// There, and of nobody else.
    Own(u64),
    /// There, and also a snapshot's: it must not be written.
    Shared(u64),
    /// There, run-length encoded, with so many bytes.
    Packed(u64, u64),
}

/// What is done for a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Data,
    Table,
    TableNow,
}

/// A write that makes a cluster this layer's own.
#[derive(Clone, Copy, Debug)]
struct Making {
    cluster: u64,
    becomes: Cluster,
    doing: Doing,
}

pub(super) struct Cow {
    pub(super) clusters: Vec<Cluster>,
    /// What is xored to all bytes of clusters that are not packed; 0: plain.
    pub(super) key: u8,
    makings: [Option<Making>; 4],
    settled: VecDeque<Settled>,
    /// Where clusters were that are of no use any more: their space is given back.
    free: Vec<u64>,
    end: u64,
}

impl Cow {
    /// With room for its table at the file's beginning; data begins at `end`.
    pub(super) fn new(clusters: Vec<Cluster>, key: u8, end: u64) -> Cow {
        Cow { clusters, key, makings: [None; 4], settled: VecDeque::new(), free: Vec::new(), end }
    }

    fn making(&self, cluster: u64) -> bool {
        self.makings.iter().flatten().any(|making| making.cluster == cluster)
    }

    fn make(&mut self, cluster: u64, becomes: Cluster) -> Option<Ticket> {
        let index = self.makings.iter().position(Option::is_none)?;
        self.makings[index] = Some(Making { cluster, becomes, doing: Doing::Data });
        Some(Ticket(index as u32))
    }
}

/// Run lengths: pairs of a byte and how often it comes, less one.
pub(super) fn pack(bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    for run in bytes.chunk_by(|a, b| a == b) {
        run.chunks(256).for_each(|run| packed.extend([run[0], (run.len() - 1) as u8]));
    }
    packed
}

fn unpack(packed: &[u8], to: &mut [u8]) -> bool {
    let mut bytes = packed.chunks_exact(2).flat_map(|pair| std::iter::repeat_n(pair[0], usize::from(pair[1]) + 1));
    to.iter_mut().all(|to| bytes.next().map(|byte| *to = byte).is_some())
}

impl Layer for Cow {
    fn name(&self) -> &'static str {
        "cow"
    }

    fn size(&self) -> Option<u64> {
        Some(self.clusters.len() as u64 * CLUSTER)
    }

    fn plan(&mut self, ask: &Ask) -> Plan {
        if ask.op == Op::Flush {
            return Plan::Data { file: FILE, at: 0, count: 0, ticket: None };
        }
        let (cluster, within) = (ask.extent.offset / CLUSTER, ask.extent.offset % CLUSTER);
        let count = ask.extent.len.min(CLUSTER - within);
        let block = Extent { offset: cluster * CLUSTER, len: CLUSTER };
        let through = |at, stored, block, ticket| {
            Plan::Through(Through { file: FILE, at, stored, block, count, fill: false, mark: PLAIN, ticket })
        };
        if ask.op.writes() && self.making(cluster) {
            return Plan::Wait { until: None };
        }
        match (ask.op, self.clusters[cluster as usize]) {
            (Op::Discard, _) => Plan::Zeros { count, ticket: None },
            (Op::WriteZeroes, Cluster::Zero) => Plan::Zeros { count, ticket: None },
            // A whole cluster is zeroed by its entry alone.
            (Op::WriteZeroes, _) if count == CLUSTER => match self.make(cluster, Cluster::Zero) {
                Some(ticket) => Plan::Zeros { count, ticket: Some(ticket) },
                None => Plan::Wait { until: None },
            },
            (Op::Read | Op::Locate, Cluster::Nowhere) => Plan::Below { count },
            (Op::Read | Op::Locate, Cluster::Zero) => Plan::Zeros { count, ticket: None },
            (Op::Read | Op::Locate, Cluster::Packed(at, stored)) => {
                let (fill, mark, ticket) = (false, PACKED, None);
                Plan::Through(Through { file: FILE, at, stored, block, count, fill, mark, ticket })
            }
            (_, Cluster::Own(at)) if self.key == 0 => Plan::Data { file: FILE, at: at + within, count, ticket: None },
            (Op::Read | Op::Locate, Cluster::Shared(at)) if self.key == 0 => {
                Plan::Data { file: FILE, at: at + within, count, ticket: None }
            }
            // Sectors that are encrypted, each by itself.
            (_, Cluster::Own(at)) | (Op::Read | Op::Locate, Cluster::Shared(at)) => {
                through(at + within, count, Extent { offset: ask.extent.offset, len: count }, None)
            }
            // Copy on write.
            (_, Cluster::Nowhere | Cluster::Zero | Cluster::Shared(_) | Cluster::Packed(..)) => {
                let Some(ticket) = self.make(cluster, Cluster::Own(self.end)) else {
                    return Plan::Wait { until: None };
                };
                self.end += CLUSTER;
                through(self.end - CLUSTER, CLUSTER, block, Some(ticket))
            }
        }
    }

    fn tickets(&self) -> usize {
        self.makings.len()
    }

    fn ended(&mut self, ticket: Ticket, done: bool) {
        let making = &mut self.makings[ticket.0 as usize];
        match making {
            Some(making) if done => making.doing = Doing::Table,
            _ => {
                *making = None;
                self.settled.push_back(Settled { ticket, done: false });
            }
        }
    }

    fn settled(&mut self) -> Option<Settled> {
        self.settled.pop_front()
    }

    fn next_meta(&mut self) -> Option<Meta> {
        if let Some(at) = self.free.pop() {
            return Some(Meta { id: FREED, op: MetaOp::Discard, file: FILE, at, len: CLUSTER });
        }
        let (index, making) = (0..).zip(&mut self.makings).find_map(|(index, making)| {
            making.as_mut().filter(|making| making.doing == Doing::Table).map(|making| (index, making))
        })?;
        making.doing = Doing::TableNow;
        Some(Meta { id: MetaId(index), op: MetaOp::Write, file: FILE, at: TABLE + making.cluster * 512, len: 512 })
    }

    fn meta_bytes(&mut self, _: MetaId, to: &mut [u8]) {
        to.fill(0xee);
    }

    fn meta_done(&mut self, id: MetaId, result: Option<&[u8]>) {
        if id == FREED {
            return;
        }
        let making = self.makings[id.0 as usize].take().unwrap();
        if result.is_some() {
            let before = std::mem::replace(&mut self.clusters[making.cluster as usize], making.becomes);
            // Nothing points there any more.
            self.free.extend(if let Cluster::Own(at) = before { Some(at) } else { None });
        }
        self.settled.push_back(Settled { ticket: Ticket(id.0 as u32), done: result.is_some() });
    }

    fn meta_len(&self) -> usize {
        512
    }

    fn block_len(&self) -> usize {
        CLUSTER as usize
    }

    fn transform(&mut self, op: Op, through: &Through, stored: &mut [u8], content: &mut [u8]) -> bool {
        if through.mark == PACKED {
            return unpack(stored, content);
        }
        let (from, to) = if op == Op::Read { (&*stored, content) } else { (&*content, stored) };
        from.iter().zip(to).for_each(|(from, to)| *to = from ^ self.key);
        true
    }
}
