//! What ranks tell each other, as versioned bytes, checked on the way in.
//!
//! Records are a few 64-bit words, little-endian, equal in length on all ranks so that one allgather carries them. A table is a
//! short head (magic, wire version, rank, length, digest) and a postcard body. Nothing that comes in is believed: lengths, indices,
//! sums and nesting are checked before a planner sees them.
//!
//! Knows bytes and the types of `layout`. Must not know plans or communicators.
#![forbid(unsafe_code)]

use crate::abi::*;
use crate::convert::Convert;
use crate::error::{Result, bail, err};
use crate::geom::{Axis, Pattern};
use crate::layout::{Layout, Tensor, Tile};
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use xxhash_rust::xxh3::xxh3_64;

/// Number of the formats in this file. Changes with any change of them.
pub const WIRE_VERSION: u16 = 5;

const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"RSHC");
const TABLE_MAGIC: u32 = u32::from_le_bytes(*b"RSHT");
const TABLE_HEAD: usize = 32;

/// `N` words as bytes.
fn words<const N: usize>(values: [u64; N]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// `N` words of bytes that a peer sent.
fn parse<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let mut out = [0; N];
    for (w, b) in out.iter_mut().zip(bytes.chunks_exact(8)) {
        *w = u64::from_le_bytes(b.try_into().expect("8 bytes"));
    }
    out
}

/// The record of each rank at connect: 128 bytes. Bytes 0 to 3 are the magic, 4 and 5 the wire version, 6 and 7 the planner version:
/// these never move, so that any two versions can name their difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// [`WIRE_VERSION`] of the rank.
    pub wire: u16,
    /// `plan::PLANNER_VERSION` of the rank.
    pub planner: u16,
    /// Its rank, and what it thinks the number of ranks is.
    pub rank: u32,
    /// See `rank`.
    pub world: u32,
    /// Equal on ranks of one host.
    pub host: u64,
    /// Identity of its device, 0 for host memory.
    pub device: [u64; 2],
    /// Its process.
    pub pid: u32,
    /// Whether its memory is big-endian.
    pub big_endian: bool,
    /// Whether it has been given every rank's table.
    pub imported: bool,
    /// Whether it can put a whole sync on a stream, and whether it has weights without being able to.
    pub streams: [bool; 2],
    /// Whether it passes on what its targets get.
    pub relays: bool,
    /// Its staging bound in bytes.
    pub staging: u64,
    /// Length of its table in bytes.
    pub table_len: u64,
    /// Digest of its table.
    pub table_digest: u64,
    /// How often it was bound to addresses.
    pub binding: u64,
    /// Digest of its world spec; 0: it is described by tables.
    pub spec: u64,
    /// What turned out of the spec when its parameters were bound.
    pub variants: [u64; 2],
}

impl Record {
    /// Length in bytes.
    pub const LEN: usize = 128;

    /// To send.
    pub fn encode(&self) -> Vec<u8> {
        words::<16>([
            u64::from(RECORD_MAGIC) | u64::from(self.wire) << 32 | u64::from(self.planner) << 48,
            u64::from(self.rank) | u64::from(self.world) << 32,
            self.host,
            self.device[0],
            self.device[1],
            u64::from(self.pid)
                | u64::from(self.big_endian) << 32
                | u64::from(self.imported) << 33
                | u64::from(self.streams[0]) << 34
                | u64::from(self.streams[1]) << 35
                | u64::from(self.relays) << 36,
            self.staging,
            self.table_len,
            self.table_digest,
            self.binding,
            self.spec,
            self.variants[0],
            self.variants[1],
            0,
            0,
            0,
        ])
    }

    /// What `rank` sent, refused if its versions differ from `planner` and [`WIRE_VERSION`] or it is another rank.
    pub fn decode(bytes: &[u8], rank: u32, world: u32, planner: u16) -> Result<Record> {
        let w = parse::<16>(bytes);
        let (magic, wire, its_planner) = (w[0] as u32, (w[0] >> 32) as u16, (w[0] >> 48) as u16);
        if magic != RECORD_MAGIC {
            bail!(
                RS_ERR_MISMATCH,
                "rank {rank} is not in connect: it sent {magic:#010x} where a record starts with {RECORD_MAGIC:#010x}"
            );
        }
        if wire != WIRE_VERSION {
            bail!(
                RS_ERR_MISMATCH,
                "rank {rank} has wire version {wire}, this rank {WIRE_VERSION}: load one libreshard on all ranks"
            );
        }
        if its_planner != planner {
            bail!(
                RS_ERR_MISMATCH,
                "rank {rank} has planner version {its_planner}, this rank {planner}: load one libreshard on all ranks"
            );
        }
        let record = Record {
            wire,
            planner: its_planner,
            rank: w[1] as u32,
            world: (w[1] >> 32) as u32,
            host: w[2],
            device: [w[3], w[4]],
            pid: w[5] as u32,
            big_endian: w[5] >> 32 & 1 == 1,
            imported: w[5] >> 33 & 1 == 1,
            streams: [w[5] >> 34 & 1 == 1, w[5] >> 35 & 1 == 1],
            relays: w[5] >> 36 & 1 == 1,
            staging: w[6],
            table_len: w[7],
            table_digest: w[8],
            binding: w[9],
            spec: w[10],
            variants: [w[11], w[12]],
        };
        if (record.rank, record.world) != (rank, world) {
            bail!(
                RS_ERR_MISMATCH,
                "the record of rank {rank} of {world} says rank {} of {}: the communicator mixes ranks up",
                record.rank,
                record.world
            );
        }
        if record.big_endian != cfg!(target_endian = "big") {
            bail!(RS_ERR_MISMATCH, "rank {rank} has another byte order than this rank");
        }
        Ok(record)
    }
}

/// How planning went on a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// RS_OK or an error.
    pub status: rs_status_t,
    /// Ranks that it exchanges weights with.
    pub peers: u32,
    /// Digest of the union of logical tensors, as it sees it.
    pub union: u64,
    /// Length of the error's text in bytes.
    pub text_len: u32,
}

impl Outcome {
    /// Length in bytes.
    pub const LEN: usize = 32;

    /// To send.
    pub fn encode(&self) -> Vec<u8> {
        words([self.status as u32 as u64, u64::from(self.peers), self.union, u64::from(self.text_len)])
    }

    /// What a rank sent.
    pub fn decode(bytes: &[u8]) -> Outcome {
        let w = parse::<4>(bytes);
        Outcome { status: w[0] as u32 as i32, peers: w[1] as u32, union: w[2], text_len: w[3] as u32 }
    }
}

/// A collective call of a connected container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// rs_sync_weights
    Sync,
    /// The same with RS_SYNC_VERIFY.
    VerifiedSync,
    /// rs_fingerprint
    Fingerprint,
}

impl Call {
    /// Its name in C.
    pub fn name(self) -> &'static str {
        match self {
            Call::Sync => "rs_sync_weights",
            Call::VerifiedSync => "rs_sync_weights with RS_SYNC_VERIFY",
            Call::Fingerprint => "rs_fingerprint",
        }
    }
}

/// What a rank says before a sync's first byte, and (with its status) after the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which call it begins.
    pub call: Call,
    /// The caller's version of a sync.
    pub version: u64,
    /// Digest of what all ranks agreed on at connect.
    pub plan: u64,
    /// Digest of `only`, or of what the fingerprint is of.
    pub subset: u64,
    /// How often the rank was bound to addresses.
    pub binding: u64,
    /// RS_OK, or why the rank cannot go on.
    pub status: rs_status_t,
}

impl Header {
    /// Length in bytes.
    pub const LEN: usize = 40;

    /// To send.
    pub fn encode(&self) -> Vec<u8> {
        let last = u64::from(self.status as u32) | (self.call as u64) << 32;
        words([self.version, self.plan, self.subset, self.binding, last])
    }

    /// What a rank sent.
    pub fn decode(bytes: &[u8]) -> Header {
        let w = parse::<5>(bytes);
        let known = [Call::Sync, Call::VerifiedSync].into_iter().find(|&call| w[4] >> 32 == call as u64);
        let call = known.unwrap_or(Call::Fingerprint);
        Header { call, version: w[0], plan: w[1], subset: w[2], binding: w[3], status: w[4] as u32 as i32 }
    }
}

/// A buffer as other ranks need to know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableBuffer {
    /// The framework's parameter name, for errors and reports.
    pub name: String,
    /// `RS_SOURCE | RS_TARGET`.
    pub role: u32,
    /// DLPack code and bits.
    pub dtype: (u8, u8),
}

/// One rank's tables as all ranks plan with them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Logical tensors.
    pub tensors: Vec<Tensor>,
    /// Buffers.
    pub buffers: Vec<TableBuffer>,
    /// Tiles.
    pub tiles: Vec<Tile>,
}

#[derive(Serialize, Deserialize)]
struct Body {
    tensors: Vec<(String, Vec<u64>)>,
    buffers: Vec<TableBuffer>,
    tiles: Vec<BodyTile>,
}

/// Tensor, buffer, transform, key, val, axes.
type BodyTile = (u32, u32, u32, u64, u64, Vec<(u64, u64, u64)>);

impl Table {
    /// A rank's own.
    pub fn of(layout: &Layout) -> Table {
        let buffers = layout.buffers().iter();
        Table {
            tensors: layout.tensors().to_vec(),
            buffers: buffers
                .map(|b| TableBuffer { name: b.name.clone(), role: b.role, dtype: (b.dtype.code, b.dtype.bits) })
                .collect(),
            tiles: layout.tiles().to_vec(),
        }
    }

    /// To send.
    pub fn encode(&self, rank: u32) -> Result<Vec<u8>> {
        let tile = |t: &Tile| {
            let axes = t.pattern.axes.iter().map(|a| (a.extent, a.key, a.val)).collect();
            (t.tensor, t.buffer, t.transform, t.pattern.key, t.pattern.val, axes)
        };
        let body = Body {
            tensors: self.tensors.iter().map(|t| (t.name.clone(), t.shape.clone())).collect(),
            buffers: self.buffers.clone(),
            tiles: self.tiles.iter().map(tile).collect(),
        };
        let body = postcard::to_allocvec(&body).map_err(|e| err!(RS_ERR_INTERNAL, "a table could not be written: {e}"))?;
        let head = u64::from(TABLE_MAGIC) | u64::from(WIRE_VERSION) << 32;
        let mut out = words([head, u64::from(rank), body.len() as u64, xxh3_64(&body)]);
        out.extend(body);
        Ok(out)
    }

    /// The rank that a table belongs to and the digest of its body, without reading the body.
    pub fn head(bytes: &[u8]) -> Result<(u32, u64)> {
        if bytes.len() < TABLE_HEAD {
            bail!(RS_ERR_INVALID, "{} bytes are no table: its head alone has {TABLE_HEAD}", bytes.len());
        }
        let w = parse::<4>(bytes);
        if w[0] as u32 != TABLE_MAGIC {
            bail!(RS_ERR_INVALID, "not a table: it starts with {:#010x} instead of {TABLE_MAGIC:#010x}", w[0] as u32);
        }
        if w[0] >> 32 != u64::from(WIRE_VERSION) {
            bail!(RS_ERR_MISMATCH, "a table of wire version {}, this library reads {WIRE_VERSION}", w[0] >> 32);
        }
        if w[2] != (bytes.len() - TABLE_HEAD) as u64 {
            bail!(RS_ERR_INVALID, "a table of {} bytes announces a body of {}", bytes.len(), w[2]);
        }
        let digest = xxh3_64(&bytes[TABLE_HEAD..]);
        if w[3] != digest {
            bail!(RS_ERR_INVALID, "a table with digest {digest:#018x} announces {:#018x}: its bytes are damaged", w[3]);
        }
        u32::try_from(w[1]).map(|rank| (rank, digest)).map_err(|_| err!(RS_ERR_INVALID, "a table of rank {}", w[1]))
    }

    /// What a rank sent, checked.
    pub fn decode(bytes: &[u8]) -> Result<(u32, Table)> {
        let (rank, _) = Table::head(bytes)?;
        let table = Table::body(&bytes[TABLE_HEAD..]).map_err(|e| e.context(format_args!("table of rank {rank}")))?;
        Ok((rank, table))
    }

    fn body(bytes: &[u8]) -> Result<Table> {
        let (body, rest): (Body, _) =
            postcard::take_from_bytes(bytes).map_err(|e| err!(RS_ERR_INVALID, "its body cannot be read: {e}"))?;
        if !rest.is_empty() {
            bail!(RS_ERR_INVALID, "{} bytes follow its body", rest.len());
        }
        let mut out = Table { tensors: vec![], buffers: body.buffers, tiles: Vec::with_capacity(body.tiles.len()) };
        for (name, shape) in body.tensors {
            let elements = shape.iter().try_fold(1u64, |n, &e| n.checked_mul(e)).filter(|&n| n > 0 && n <= i64::MAX as u64);
            match elements {
                Some(elements) if shape.len() <= RS_MAX_RANK => out.tensors.push(Tensor { name, shape, elements }),
                _ => bail!(RS_ERR_INVALID, "tensor '{name}' has shape {shape:?}"),
            }
        }
        for b in &out.buffers {
            let dtype = rs_dtype_t { code: b.dtype.0, bits: b.dtype.1, lanes: 1 };
            crate::layout::item_size(dtype).map_err(|e| e.context(format_args!("buffer '{}'", b.name)))?;
        }
        for (i, (tensor, buffer, transform, key, val, axes)) in body.tiles.into_iter().enumerate() {
            let tile = Tile { tensor, buffer, pattern: pattern(key, val, &axes), transform };
            let elements = out.tensors.get(tensor as usize).map(|t| t.elements);
            let allowed = may_have(out.buffers.get(buffer as usize), transform);
            match elements {
                Some(elements) if allowed && sound(&tile.pattern, elements) => out.tiles.push(tile),
                _ => bail!(RS_ERR_INVALID, "tiles[{i}] does not lie in its tensor"),
            }
        }
        Ok(out)
    }
}

/// Whether there is such a buffer, and its tiles may have that transform.
fn may_have(buffer: Option<&TableBuffer>, transform: u32) -> bool {
    let fits = |b: &TableBuffer| b.role == RS_TARGET && Convert::between(b.dtype, b.dtype, transform).is_ok();
    buffer.is_some_and(|b| transform == RS_TRANSFORM_NONE || fits(b))
}

fn pattern(key: u64, val: u64, axes: &[(u64, u64, u64)]) -> Pattern {
    let axes: SmallVec<[Axis; 3]> = axes.iter().map(|&(extent, key, val)| Axis { extent, key, val }).collect();
    Pattern { key, val, axes }
}

/// Whether a pattern is one that a checked layout could hold: coalesced, nested on both sides, inside its tensor, nothing beyond 2^63.
fn sound(p: &Pattern, elements: u64) -> bool {
    let end = |first: u64, step: fn(&Axis) -> u64| {
        p.axes
            .iter()
            .try_fold(first, |sum, a| sum.checked_add((a.extent - 1).checked_mul(step(a))?))
            .filter(|&e| e < i64::MAX as u64)
    };
    p.axes.len() <= RS_MAX_RANK
        && p.axes.iter().all(|a| a.extent > 1 && a.key > 0 && a.val > 0)
        && end(p.key, |a| a.key).is_some_and(|e| e < elements)
        && end(p.val, |a| a.val).is_some()
        && p.axes.windows(2).all(|w| w[0].key > w[1].key)
        && p.nests()
        && p.flip().nests()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        Table {
            tensors: vec![Tensor { name: "w".into(), shape: vec![4, 6], elements: 24 }],
            buffers: vec![TableBuffer { name: "p".into(), role: 1, dtype: (4, 16) }],
            tiles: vec![Tile { tensor: 0, buffer: 0, pattern: pattern(3, 0, &[(4, 6, 3), (3, 1, 1)]), transform: 0 }],
        }
    }

    #[test]
    fn tables_come_back_and_damage_is_found() {
        let bytes = table().encode(5).unwrap();
        assert_eq!(Table::decode(&bytes).unwrap(), (5, table()));
        for i in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[i] ^= 0x10;
            // The rank is not covered by the digest; everything else is.
            match Table::decode(&bad) {
                Ok((rank, t)) => assert!(rank != 5 && t == table() && (8..12).contains(&i), "byte {i}"),
                Err(e) => assert!(e.status() < 0),
            }
            assert!(Table::decode(&bytes[..i]).is_err());
        }
    }

    #[test]
    fn hostile_bodies_are_refused_without_a_large_allocation() {
        let refuse = |change: fn(&mut Table), word: &str| {
            let mut t = table();
            change(&mut t);
            let e = Table::decode(&t.encode(0).unwrap()).expect_err(word);
            assert!(e.text().contains(word), "{e}");
        };
        refuse(|t| t.tiles[0].pattern.key = 4, "does not lie");
        refuse(|t| t.tiles[0].pattern.axes[0].extent = u64::MAX, "does not lie");
        refuse(|t| t.tiles[0].pattern.axes[0].val = u64::MAX / 2, "does not lie");
        refuse(|t| t.tiles[0].pattern.axes[0].val = 2, "does not lie");
        refuse(|t| t.tiles[0].pattern.axes[1].val = 0, "does not lie");
        refuse(|t| t.tiles[0].tensor = 1, "does not lie");
        refuse(|t| t.tiles[0].buffer = 1, "does not lie");
        refuse(|t| t.tensors[0].shape = vec![u64::MAX, 3], "shape");
        refuse(|t| t.buffers[0].dtype = (17, 4), "bits 4");
        let mut rng = fastrand::Rng::with_seed(1);
        for _ in 0..20_000 {
            let body: Vec<u8> = (0..rng.usize(0..60)).map(|_| rng.u8(..)).collect();
            let head = u64::from(TABLE_MAGIC) | u64::from(WIRE_VERSION) << 32;
            let mut bytes = words([head, 0, body.len() as u64, xxh3_64(&body)]);
            bytes.extend(body);
            let _ = Table::decode(&bytes); // must come back at all
        }
    }

    #[test]
    fn records_name_what_differs() {
        let r = Record {
            wire: WIRE_VERSION,
            planner: 3,
            rank: 2,
            world: 4,
            host: 7,
            device: [1, 2],
            pid: 9,
            big_endian: cfg!(target_endian = "big"),
            imported: true,
            streams: [true, false],
            relays: true,
            staging: 1 << 28,
            table_len: 10,
            table_digest: 11,
            binding: 12,
            spec: 13,
            variants: [14, 15],
        };
        let bytes = r.encode();
        assert_eq!(bytes.len(), Record::LEN);
        assert_eq!(Record::decode(&bytes, 2, 4, 3).unwrap(), r);
        let text = |at: usize| {
            let mut b = bytes.clone();
            b[at] ^= 1;
            Record::decode(&b, 2, 4, 3).expect_err("differs").text().to_string()
        };
        assert!(text(0).contains("not in connect"));
        assert!(text(4).contains("rank 2 has wire version"));
        assert!(text(6).contains("planner version 2"));
        assert!(text(8).contains("mixes ranks up"));
        assert!(text(44).contains("byte order"));
    }
}
