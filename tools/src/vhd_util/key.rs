//! `key`: the hash of the key that an image is encrypted with. The data itself is not encrypted or decrypted here.

use std::io::Write;
use std::path::Path;

use drivers::vhd::layout::batmap_pieces;
use drivers::vhd::{Image, KeyHash, Kind};
use nix::errno::Errno;
use sha2::{Digest, Sha256};
use tapdisk::chain;

use super::Key;
use super::failure::{Failure, Result};
use super::file::{ImageFile, Medium, write_pieces};

/// The sizes that keys have, bits (blktap's libblockcrypto: AES-XTS).
const KEY_BITS: [usize; 2] = [512, 256];

/// Does what is asked for.
pub(super) fn key(args: &Key, out: &mut dyn Write) -> Result<()> {
    let nonce = args.nonce.as_deref().map_or(Ok([0; 32]), |nonce| unhex("-N", nonce))?;
    let say = |out: &mut dyn Write, text: &str| writeln!(out, "{text}").map_err(Failure::output);
    if args.calculate {
        let key = read_key(args.key.as_deref().unwrap_or(Path::new("")))?;
        return say(out, &hex(&hash(&nonce, &key)));
    }
    let Some(name) = &args.name else { return Ok(()) };
    if args.set {
        set(args, name, nonce)?;
    }
    if args.check {
        check(args, name)?;
    }
    if args.print {
        let layer = chain::layer(name)?;
        let line = match key_hash(layer.image.as_ref()) {
            Some(key) => format!("{} {}", hex(&key.nonce), hex(&key.hash)),
            None => "none".to_owned(),
        };
        say(out, &line)?;
    }
    Ok(())
}

/// What an image says of its key. None: it is not encrypted.
pub(super) fn key_hash(image: Option<&Image>) -> Option<KeyHash> {
    image?.batmap.as_ref()?.key_hash
}

/// Sets the hash of an image that holds nothing yet.
fn set(args: &Key, name: &Path, nonce: [u8; 32]) -> Result<()> {
    let wrong = |text: &str| Err(Failure::new(Errno::EINVAL, name, text));
    let hash = match (&args.hash, &args.key) {
        (Some(text), _) => unhex("-H", text)?,
        (None, Some(path)) => hash(&nonce, &key_of(name, path)?),
        (None, None) => return wrong("which hash? give it with -H, or the key's file with -k"),
    };
    let file = ImageFile::open(name)?;
    let mut image = file.image()?;
    if image.kind == Kind::Fixed {
        return wrong("a fixed image has no place for the hash of a key");
    }
    if image.table.allocated().next().is_some() {
        return wrong("it has data already, which is not encrypted with that key");
    }
    let batmap = image.batmap.as_mut().ok_or_else(|| super::set::no_batmap(name))?;
    batmap.key_hash = Some(KeyHash { nonce, hash });
    let header = &batmap_pieces(batmap)[1..];
    write_pieces(&file, header).and_then(|()| file.sync()).map_err(Failure::io(&file.path, "write it"))
}

/// Whether a key is the image's.
fn check(args: &Key, name: &Path) -> Result<()> {
    let wrong = |text: &str| Err(Failure::new(Errno::EINVAL, name, text));
    let Some(expected) = key_hash(chain::layer(name)?.image.as_ref()) else {
        return wrong("it is not encrypted: it has no hash of a key");
    };
    let key = key_of(name, args.key.as_deref().unwrap_or(Path::new("")))?;
    if hash(&expected.nonce, &key) != expected.hash { wrong("it is encrypted with another key") } else { Ok(()) }
}

/// The key in a file that is named as an image's keys are, with the size that the name says.
fn key_of(image: &Path, path: &Path) -> Result<Vec<u8>> {
    let stem = image.file_name().unwrap_or_default().to_string_lossy();
    let stem = stem.split(".vhd").next().unwrap_or_default();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let named = |bits: &usize| name == format!("{stem},aes-xts-plain,{bits}.key");
    let Some(bits) = KEY_BITS.into_iter().find(named) else {
        let text = format!("the key of that image is in a file {stem},aes-xts-plain,512.key, or 256");
        return Err(Failure::new(Errno::EINVAL, path, text));
    };
    let key = read_key(path)?;
    if key.len() != bits / 8 {
        let text = format!("it has {} bytes, and a key of {bits} bits {}", key.len(), bits / 8);
        return Err(Failure::new(Errno::EINVAL, path, text));
    }
    Ok(key)
}

fn read_key(path: &Path) -> Result<Vec<u8>> {
    let key = std::fs::read(path).map_err(Failure::io(path, "read it"))?;
    if key.len() > KEY_BITS[0] / 8 {
        let text = format!("it has {} bytes, and keys have at most {}", key.len(), KEY_BITS[0] / 8);
        return Err(Failure::new(Errno::EINVAL, path, text));
    }
    Ok(key)
}

/// SHA-256 of nonce and key.
fn hash(nonce: &[u8; 32], key: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update(nonce).chain_update(key).finalize().into()
}

/// Hexadecimal digits of bytes.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The 32 bytes that hexadecimal digits stand for.
fn unhex(option: &str, text: &str) -> Result<[u8; 32]> {
    let wrong = || Failure {
        errno: Errno::EINVAL,
        line: None,
        text: format!("{option} {text}: 64 hexadecimal digits are expected"),
    };
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| wrong())?;
    }
    Ok(bytes)
}
