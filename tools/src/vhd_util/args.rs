//! The command line. What has a single letter is blktap's, and means the same.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

/// Makes, inspects, changes and mends VHD images that no tapdisk serves.
///
/// The exit code is 0, or the errno of what went wrong: EINVAL (22) for an image that is no good, EBUSY (16) for one that is
/// in use.
#[derive(Debug, Parser)]
#[command(
    name = "vhd-util",
    version,
    after_help = "Examples:
  vhd-util create -n disk.vhd -s 10240
  vhd-util snapshot -n child.vhd -p disk.vhd
  vhd-util info child.vhd
  vhd-util check -n child.vhd -p
  vhd-util query -vsf -n child.vhd
  vhd-util resize -n child.vhd -s 20480 -j child.journal
  vhd-util coalesce -n child.vhd
  vhd-util scan -f -m '/images/*.vhd'
  vhd-util convert --to raw child.vhd disk.raw"
)]
pub struct Args {
    /// Accepted, as blktap's; what goes wrong is always told of
    #[arg(long, global = true, hide = true)]
    pub debug: bool,
    /// A folder that parents may be in, and below, besides the image's own folder; several times for several. An image that somebody brought can
    /// name any file of the host
    #[arg(long = "parents", global = true, value_name = "FOLDER")]
    pub folders: Vec<PathBuf>,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes an image; an existing file is never overwritten
    Create(Create),
    /// Makes a differencing image, which holds what is written after this
    Snapshot(Snapshot),
    /// Prints what is asked for, each on a line, in the order of the options here
    Query(Query),
    /// Prints headers, and other parts of an image
    Read(Read),
    /// Sets a field of the image
    Set(Set),
    /// Changes an image's parent or place in the file, or forgets its data: dangerous
    Modify(Modify),
    /// Makes the disk larger
    Resize(Resize),
    /// Undoes a resize that was interrupted
    Revert(Revert),
    /// Writes what a differencing image holds into its parent
    Coalesce(Coalesce),
    /// Looks for all that is wrong with an image, and changes nothing
    Check(Check),
    /// Mends what can be mended without touching data, and says what it did
    Repair(Repair),
    /// Lists images, a line for each
    Scan(Scan),
    /// Shows, sets or checks the hash of the key of an encrypted image
    Key(Key),
    /// Shows an image and its parents
    Info {
        /// The image
        image: PathBuf,
        /// Prints JSON
        #[arg(long)]
        json: bool,
    },
    /// Writes a disk into a new file of another format; zeros are left out
    Convert(Convert),
    /// Copies one image, which has no parent, into a new file
    Copy(Copy),
    /// Gives an image all of its blocks, with what its parents hold: it does without them then
    Fill(Fill),
}

/// What `create` makes.
#[derive(Debug, ClapArgs)]
pub struct Create {
    /// The new image
    #[arg(short, value_name = "FILE")]
    pub name: PathBuf,
    /// The disk's size, in MiB; rounded up to whole blocks of 2 MiB
    #[arg(short, value_name = "MIB")]
    pub size: u64,
    /// Reserves all of it: a fixed image
    #[arg(short)]
    pub reserve: bool,
    /// The size, in MiB, to which it can grow later without moving its blocks
    #[arg(short = 'S', value_name = "MIB")]
    pub room: Option<u64>,
}

/// What `snapshot` makes.
#[derive(Debug, ClapArgs)]
pub struct Snapshot {
    /// The new image
    #[arg(short, value_name = "FILE")]
    pub name: PathBuf,
    /// Its parent; where that has no blocks, its parent, and so on
    #[arg(short, value_name = "FILE")]
    pub parent: PathBuf,
    /// Images that its chain may have
    #[arg(short, value_name = "COUNT")]
    pub limit: Option<u32>,
    /// The parent is a raw image
    #[arg(short = 'm')]
    pub raw: bool,
    /// The size, in MiB, to which it can grow later without moving its blocks
    #[arg(short = 'S', value_name = "MIB")]
    pub room: Option<u64>,
    /// The parent is the one that is named, even if it has no blocks
    #[arg(short)]
    pub even_empty: bool,
}

/// What `query` prints.
#[derive(Debug, ClapArgs)]
pub struct Query {
    /// The image
    #[arg(short, value_name = "FILE")]
    pub name: PathBuf,
    /// The disk's size, in MiB
    #[arg(short = 'v')]
    pub size: bool,
    /// The bytes of the file that the image takes
    #[arg(short = 's')]
    pub physical: bool,
    /// The parent's path, or that there is none
    #[arg(short)]
    pub parent: bool,
    /// Whether it is hidden
    #[arg(short)]
    pub fields: bool,
    /// Its marker
    #[arg(short)]
    pub marker: bool,
    /// How many images its chain has
    #[arg(short)]
    pub depth: bool,
    /// How many blocks it has
    #[arg(short)]
    pub allocated: bool,
    /// The size, in MiB, to which it can grow without moving its blocks
    #[arg(short = 'S')]
    pub largest: bool,
    /// With -p: the path as it is in the image, whether the parent is there or not
    #[arg(short)]
    pub unresolved: bool,
    /// Goes by the footer's copy at the beginning
    #[arg(short)]
    pub backup: bool,
}

/// What `read` prints.
#[derive(Debug, ClapArgs)]
pub struct Read {
    /// The image
    #[arg(short, value_name = "FILE")]
    pub name: PathBuf,
    /// The headers
    #[arg(short)]
    pub print: bool,
    /// Where a block is
    #[arg(short, value_name = "BLOCK")]
    pub block: Option<u32>,
    /// A bit for each block, the most significant first: whether it is there
    #[arg(short = 'B')]
    pub blocks: bool,
    /// A block's bitmap, as it is in the file
    #[arg(short = 'm', value_name = "BLOCK")]
    pub bitmap: Option<u32>,
    /// The batmap's bits, as they are in the file
    #[arg(short = 'a')]
    pub batmap: bool,
    /// Where a sector of the disk is
    #[arg(short = 't', value_name = "SECTOR")]
    pub sector: Option<u64>,
    /// A sector's bit in its block's bitmap
    #[arg(short = 'i', value_name = "SECTOR")]
    pub bit: Option<u64>,
    /// The runs of sectors from this one on that are in this image, and not only in a parent: a line each, the first and how many
    #[arg(short = 'e', value_name = "SECTOR")]
    pub extents: Option<u64>,
    /// A block's bit in the batmap, on standard error
    #[arg(short = 'j', value_name = "BLOCK")]
    pub full: Option<u32>,
    /// A block's data, as it is in the file
    #[arg(short, value_name = "BLOCK")]
    pub data: Option<u32>,
    /// Sectors of the disk from this one on, as a guest sees them: with what the parents hold
    #[arg(short = 'r', value_name = "SECTOR")]
    pub sectors: Option<u64>,
    /// The same for bytes
    #[arg(short = 'R', value_name = "BYTE")]
    pub bytes: Option<u64>,
    /// Accepted, as blktap's: what is read comes through the page cache
    #[arg(short = 'C')]
    pub cached: bool,
    /// How many blocks, sectors or bytes
    #[arg(short, value_name = "COUNT", default_value_t = 1)]
    pub count: u32,
    /// Numbers in hexadecimal
    #[arg(short = 'x')]
    pub hex: bool,
}

/// What `set` sets.
#[derive(Debug, ClapArgs)]
pub struct Set {
    /// The image
    #[arg(short, value_name = "FILE")]
    pub name: PathBuf,
    /// Which field
    #[arg(short)]
    pub field: Field,
    /// 0 to 255
    #[arg(short)]
    pub value: u8,
}

/// The fields of `set`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Field {
    /// 1: users do not see the image, because it is only the parent of others
    Hidden,
    /// A number for storage managers, which means nothing here
    Marker,
}

/// What `modify` changes.
#[derive(Debug, ClapArgs)]
#[command(group = clap::ArgGroup::new("change").args(["parent", "size", "zero"]).required(true).multiple(true))]
pub struct Modify {
    /// The image
    #[arg(short, value_name = "FILE")]
    pub name: PathBuf,
    /// The new parent; what it holds must be what the old one did
    #[arg(short, value_name = "FILE")]
    pub parent: Option<PathBuf>,
    /// The new parent is a raw image
    #[arg(short = 'm', requires = "parent")]
    pub raw: bool,
    /// Puts the footer where it belongs in a file of so many bytes
    #[arg(short, value_name = "BYTES")]
    pub size: Option<u64>,
    /// Forgets all blocks
    #[arg(short)]
    pub zero: bool,
}

/// How `resize` grows.
#[derive(Debug, ClapArgs)]
#[command(group = clap::ArgGroup::new("how").args(["journal", "fast"]).required(true))]
pub struct Resize {
    /// The image
    #[arg(short, value_name = "FILE")]
    pub name: PathBuf,
    /// The disk's new size, in MiB; rounded up to whole blocks of 2 MiB
    #[arg(short, value_name = "MIB")]
    pub size: u64,
    /// Where that is kept which `revert` needs; it is removed when all is done
    #[arg(short, value_name = "FILE")]
    pub journal: Option<PathBuf>,
    /// Only if no block has to be moved
    #[arg(short)]
    pub fast: bool,
}

/// What `revert` undoes.
#[derive(Debug, ClapArgs)]
pub struct Revert {
    /// The image
    #[arg(short, value_name = "FILE")]
    pub name: PathBuf,
    /// The journal of the resize
    #[arg(short, value_name = "FILE")]
    pub journal: PathBuf,
}

/// What `coalesce` merges.
#[derive(Debug, ClapArgs)]
pub struct Coalesce {
    /// The differencing image; it is not changed
    #[arg(short, value_name = "FILE")]
    pub name: PathBuf,
    /// Accepted, as blktap's: a new block's unwritten part is never written
    #[arg(short)]
    pub sparse: bool,
    /// Shows the progress on standard output
    #[arg(short)]
    pub progress: bool,
}

/// What `check` looks at.
#[derive(Debug, ClapArgs)]
pub struct Check {
    /// The image
    #[arg(short, value_name = "FILE")]
    pub name: PathBuf,
    /// Does not mind a footer at the end that is no good, if the copy at the beginning is: such is an image that was in use
    /// when the host stopped
    #[arg(short)]
    pub ignore_footer: bool,
    /// Does not mind a parent with another UUID
    #[arg(short = 'I')]
    pub ignore_uuid: bool,
    /// Does not mind times that are yet to come
    #[arg(short = 't')]
    pub ignore_times: bool,
    /// Does not mind blocks that overlap
    #[arg(short = 'B', conflicts_with_all = ["bitmaps", "stats"])]
    pub ignore_overlaps: bool,
    /// Checks its parents, too
    #[arg(short)]
    pub parents: bool,
    /// Checks the blocks' bitmaps, too, against the batmap and the data: reads all that says it is not there
    #[arg(short)]
    pub bitmaps: bool,
    /// Prints how many sectors each image holds
    #[arg(short)]
    pub stats: bool,
}

/// What `repair` mends.
#[derive(Debug, ClapArgs)]
pub struct Repair {
    /// The image
    #[arg(short, value_name = "FILE")]
    pub name: PathBuf,
    /// Looks at all blocks' bitmaps, too
    #[arg(long)]
    pub bitmaps: bool,
}

/// What `scan` lists.
#[derive(Debug, ClapArgs)]
pub struct Scan {
    /// Images
    #[arg(value_name = "FILE", required_unless_present = "pattern")]
    pub images: Vec<PathBuf>,
    /// Images whose path matches this; quote it
    #[arg(short = 'm', value_name = "PATTERN")]
    pub pattern: Option<String>,
    /// Reads only the headers, and does not look for parents
    #[arg(short)]
    pub fast: bool,
    /// Goes on after an image that is no good
    #[arg(short = 'c')]
    pub go_on: bool,
    /// Images in logical volumes of this group, active or not; the pattern is for the volumes' names. It runs lvs and pvs (lvm2)
    #[arg(short = 'l', value_name = "GROUP")]
    pub group: Option<String>,
    /// Prints images below their parents
    #[arg(short)]
    pub pretty: bool,
    /// Lists their parents, too
    #[arg(short = 'a')]
    pub parents: bool,
    /// Prints paths rather than names
    #[arg(short)]
    pub verbose: bool,
    /// Prints markers and hashes of keys, too
    #[arg(short = 'M')]
    pub markers: bool,
}

/// What `key` does.
#[derive(Debug, ClapArgs)]
#[command(group = clap::ArgGroup::new("what").args(["set", "check", "calculate", "print"]).required(true).multiple(true))]
pub struct Key {
    /// The image
    #[arg(short, value_name = "FILE", required_unless_present = "calculate")]
    pub name: Option<PathBuf>,
    /// Sets the hash, of an image without blocks
    #[arg(short, conflicts_with_all = ["check", "calculate"])]
    pub set: bool,
    /// Checks whether a key is the image's
    #[arg(short, requires = "key", conflicts_with = "calculate")]
    pub check: bool,
    /// Prints a key's hash
    #[arg(short = 'C', requires = "key")]
    pub calculate: bool,
    /// Prints nonce and hash, or "none"
    #[arg(short)]
    pub print: bool,
    /// The key, in a file IMAGE,aes-xts-plain,BITS.key with 256 or 512 bits
    #[arg(short, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// The hash: SHA-256 of nonce and key, 64 hexadecimal digits
    #[arg(short = 'H', value_name = "HASH", conflicts_with = "key")]
    pub hash: Option<String>,
    /// The nonce, 64 hexadecimal digits; zeros without it
    #[arg(short = 'N', value_name = "NONCE")]
    pub nonce: Option<String>,
}

/// What `convert` writes.
#[derive(Debug, ClapArgs)]
pub struct Convert {
    /// The format to write
    #[arg(long)]
    pub to: Format,
    /// The format to read; vhd if the file ends in a VHD footer
    #[arg(long)]
    pub from: Option<Format>,
    /// The disk: an image with its parents, or a raw file or device
    pub source: PathBuf,
    /// The new file, or a device
    pub target: PathBuf,
}

/// What `copy` makes.
#[derive(Debug, ClapArgs)]
pub struct Copy {
    /// The image
    #[arg(short, value_name = "FILE")]
    pub name: PathBuf,
    /// The new image
    #[arg(short = 'N', value_name = "FILE")]
    pub new_name: PathBuf,
    /// Refused: blktap's encrypts the copy with a key from this file
    #[arg(short, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Refused: the same with a key from standard input
    #[arg(short = 'E')]
    pub key_from_stdin: bool,
}

/// What `fill` adds.
#[derive(Debug, ClapArgs)]
pub struct Fill {
    /// The image
    #[arg(short, value_name = "FILE")]
    pub name: PathBuf,
    /// Adds the blocks that are not there, of zeros, without writing data; not of an image with a parent, whose data they would hide
    #[arg(short)]
    pub blocks: bool,
    /// With -b: from the block of this sector on
    #[arg(short, value_name = "SECTOR", requires = "blocks")]
    pub from: Option<u64>,
    /// With -b: up to the block of this sector
    #[arg(short = 't', value_name = "SECTOR", requires = "blocks")]
    pub to: Option<u64>,
}

/// The formats of `convert`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The disk's bytes, one after the other
    Raw,
    /// VHD; a dynamic image is written
    Vhd,
}
