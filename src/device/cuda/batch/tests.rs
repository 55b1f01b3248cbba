//! Descriptors, taken apart again by the plainest reading of what copy.cu says, against the copies that they were made of.
use super::desc::{Axis, Desc};
use super::*;
use crate::convert::Float;
use std::mem::offset_of;

/// One element's way: bytes from an address to an address, or a conversion.
type Way = (u64, u64, u64, Option<Convert>);

/// The ways of a copy, by target. Plain ones as single bytes.
fn ways_of(src: u64, dst: u64, copy: &StridedCopy) -> Vec<Way> {
    let item = copy.convert.map_or((1, 1), |c| (u64::from(c.from.item()), u64::from(c.to.item())));
    let mut ways = vec![];
    for n in 0..copy.axes.iter().map(|axis| axis.extent).product() {
        let (mut rest, mut src, mut dst): (u64, _, _) = (n, src, dst);
        for axis in &copy.axes {
            src += rest % axis.extent * axis.src;
            dst += rest % axis.extent * axis.dst;
            rest /= axis.extent;
        }
        ways.extend((0..copy.run / item.0).map(|i| (dst + i * item.1, src + i * item.0, item.0, copy.convert)));
    }
    ways
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn decode(bytes: &[u8]) -> Desc {
    let long = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
    let mut words = (16..bytes.len()).step_by(4).map(|at| word(bytes, at));
    let mut next = || words.next().unwrap();
    Desc {
        src: long(0),
        dst: long(8),
        items: next(),
        per_chunk: next(),
        path: next(),
        rank: next(),
        add: f32::from_bits(next()),
        src_f16: next(),
        dst_f16: next(),
        store: next(),
        tiles: next(),
        s_extent: next(),
        d_extent: next(),
        s_src: next(),
        s_dst: next(),
        d_src: next(),
        d_dst: next(),
        zero: next(),
        axes: std::array::from_fn(|_| Axis { extent: next(), magic: next(), shift: next(), src: next(), dst: next() }),
    }
}

/// The conversion of a descriptor, and its elements' bytes on both sides.
fn conversion(desc: &Desc) -> (Option<Convert>, u64, u64) {
    let float = |wide: bool, f16: u32| if wide { Float::F32 } else { [Float::Bf16, Float::F16][f16 as usize] };
    if desc.path < CAST {
        return (None, 1, 1);
    }
    let (from, to) = (float(desc.path % 4 >= 2, desc.src_f16), float(desc.path % 2 == 1, desc.dst_f16));
    assert!(desc.add != 0.0 || desc.add.is_sign_negative(), "adding +0 makes a zero positive");
    (Some(Convert { from, to, add: desc.add as i8 }), u64::from(from.item()), u64::from(to.item()))
}

/// `n` accesses of `item` bytes from one address on to another, each aligned as the path promises.
fn moved(ways: &mut Vec<Way>, desc: &Desc, at: (u64, u64), bytes: (u64, u64), aligned: bool) {
    let (convert, src_item, dst_item) = conversion(desc);
    assert!(!aligned || at.0 % bytes.0 == 0, "{bytes:?} read at {:#x}: {desc:?}", at.0);
    let span = |at: u64, from: u64| assert!(at >= from && at - from < LIMIT, "{desc:?}");
    span(at.0, desc.src);
    span(at.1, desc.dst);
    ways.extend((0..bytes.0 / src_item).map(|i| (at.1 + i * dst_item, at.0 + i * src_item, src_item, convert)));
}

/// What item `n` of a descriptor moves.
fn item(ways: &mut Vec<Way>, desc: &Desc, n: u32) {
    let (mut rest, mut src, mut dst) = (n, desc.src, desc.dst);
    let mut index = [0; AXES];
    for (axis, index) in desc.axes[..desc.rank as usize].iter().zip(&mut index) {
        assert_eq!((u64::from(rest) * u64::from(axis.magic)) >> (31 + axis.shift), u64::from(rest / axis.extent));
        *index = rest % axis.extent;
        rest /= axis.extent;
        src += u64::from(*index) * u64::from(axis.src);
        dst += u64::from(*index) * u64::from(axis.dst);
    }
    assert_eq!(rest, 0);
    let (convert, src_item, dst_item) = conversion(desc);
    if desc.tiles == 0 {
        let lanes = match convert {
            None => 1 << desc.path,
            Some(_) if desc.path / 4 == CAST_WIDE / 4 => UNIT / src_item.max(dst_item),
            Some(_) => 1,
        };
        let odd = desc.path >= CAST_ODD;
        assert!(odd || dst % (lanes * dst_item) == 0, "written at {dst:#x}: {desc:?}");
        return moved(ways, desc, (src, dst), (lanes * src_item, lanes * dst_item), !odd);
    }
    let dst_item = 1 << (desc.store & 7);
    let src_item = if convert.is_some() { src_item } else { dst_item };
    let columns = (ROW / dst_item) as u32;
    let left = |extent: u32, index: u32, most: u32| (extent - index * most).min(most);
    let (wide, tall) = (left(desc.s_extent, index[0], columns), left(desc.d_extent, index[1], TILE_ROWS as u32));
    for (s, d) in (0..tall).flat_map(|d| (0..wide).map(move |s| (u64::from(s), u64::from(d)))) {
        let src = src + s * u64::from(desc.s_src) + d * u64::from(desc.d_src);
        let dst = dst + s * u64::from(desc.s_dst) + d * u64::from(desc.d_dst);
        if desc.path == UNITS {
            assert!(desc.s_src as u64 == src_item && u64::from(desc.s_extent) * src_item % UNIT == 0);
            assert!(s * src_item % UNIT != 0 || src % UNIT == 0, "a unit read at {src:#x}: {desc:?}");
        } else {
            assert_eq!(
                if convert.is_some() { desc.path / 4 * 4 } else { 1 << desc.path },
                convert.map_or(src_item as u32, |_| CAST)
            );
        }
        if desc.store & STORE_WIDE != 0 {
            assert!(dst_item < UNIT && desc.d_dst as u64 == dst_item && u64::from(desc.d_extent) * dst_item % UNIT == 0);
            assert!(d * dst_item % UNIT != 0 || dst % UNIT == 0, "16 bytes written at {dst:#x}: {desc:?}");
        }
        assert_eq!(dst % dst_item, 0);
        moved(ways, desc, (src, dst), (src_item, dst_item), true);
    }
}

fn descs(list: &Descriptors) -> Vec<Desc> {
    list.bytes().chunks_exact(size_of::<Desc>()).map(decode).collect()
}

/// All that a list moves, found like the kernel does: chunk by chunk.
fn ways(list: &Descriptors) -> Vec<Way> {
    let descs = descs(list);
    assert_eq!(descs.len(), list.count() as usize);
    let first: Vec<u32> = list.first_bytes().chunks_exact(4).map(|bytes| word(bytes, 0)).collect();
    let mut out = vec![];
    for chunk in 0..list.chunks {
        let at = first.partition_point(|first| *first <= chunk) - 1;
        let desc = &descs[at];
        assert!((1..=AXES as u32).contains(&desc.rank) && u64::from(desc.items) < LIMIT);
        let begin = (chunk - first[at]) * desc.per_chunk;
        assert!(begin < desc.items, "chunk {chunk} is empty: {desc:?}");
        (begin..desc.items.min(begin + desc.per_chunk)).for_each(|n| item(&mut out, desc, n));
    }
    for (dst, src, bytes) in &list.copies {
        out.extend((0..*bytes).map(|i| (dst + i, src + i, 1, None)));
    }
    out
}

fn sorted(mut ways: Vec<Way>) -> Vec<Way> {
    ways.sort_by_key(|way| way.0);
    ways
}

fn check(copies: &[(u64, u64, StridedCopy)]) -> Descriptors {
    let list = Descriptors::of(copies.iter().map(|(src, dst, copy)| (*src, *dst, copy)));
    let expected = sorted(copies.iter().flat_map(|(src, dst, copy)| ways_of(*src, *dst, copy)).collect());
    let got = sorted(ways(&list));
    if got != expected {
        let differs = got.iter().zip(&expected).position(|(got, expected)| got != expected);
        panic!("{differs:?} of {} and {}: {copies:?} became {:?}", got.len(), expected.len(), descs(&list));
    }
    list
}

/// Elements over `shape`, each side in its own axis order, some axes with gaps after them.
fn random(rng: &mut fastrand::Rng) -> StridedCopy {
    let floats = [Float::F32, Float::F16, Float::Bf16];
    let convert = (rng.u8(..3) == 0).then(|| {
        let (from, to, add) = (floats[rng.usize(..3)], floats[rng.usize(..3)], rng.i8(-1..2));
        Convert { from, to, add }
    });
    let item = convert.map_or_else(|| 1 << rng.u32(..5), |c| c.from.item());
    if rng.u8(..4) == 0 {
        // A plane turned, the extents about whole units, with the next row at a multiple of 16 elements.
        let [rows, columns] = [(); 2].map(|()| rng.u64(1..8) * 16 + rng.choice([0, 0, 0, 1, 5]).unwrap());
        let pitches = [rows, columns].map(|n| n.next_multiple_of(16));
        return StridedCopy::converting(
            item,
            convert,
            0,
            0,
            [(rows, 1, pitches[1]), (columns, pitches[0], 1), (2, 1 << 16, 1 << 15)],
        );
    }
    let mut left: u64 = 6000;
    let shape: Vec<u64> = (0..rng.usize(..9))
        .map(|_| {
            let n = if rng.bool() { rng.u64(1..6) } else { rng.u64(1..=left.clamp(1, 400)) }.min(left);
            left = (left / n).max(1);
            n
        })
        .collect();
    // Pitches that keep alignment, mostly.
    let whole = rng.choice([1, 8, 16]).unwrap();
    let mut strides = || {
        let mut order: Vec<usize> = (0..shape.len()).collect();
        rng.shuffle(&mut order);
        let mut strides = vec![0; shape.len()];
        let mut next = if rng.u8(..5) == 0 { 2 } else { 1 };
        for axis in order {
            strides[axis] = next;
            next = (next * shape[axis] + if rng.u8(..3) == 0 { rng.u64(1..40) } else { 0 }).next_multiple_of(whole);
        }
        strides
    };
    let (src, dst) = (strides(), strides());
    let axes = shape.iter().zip(src.iter().zip(&dst)).map(|(n, (s, d))| (*n, *s, *d));
    StridedCopy::converting(item, convert, 0, 0, axes)
}

#[test]
fn random_lists() {
    let cases = if cfg!(debug_assertions) { 2000 } else { 5000 };
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..cases {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut at = (0x7F00_0000_0000, 0x7E00_0000_0000);
        let copies: Vec<_> = (0..rng.usize(1..4))
            .map(|_| {
                let copy = random(&mut rng);
                let place = |rng: &mut fastrand::Rng, at: u64| match rng.u8(..4) {
                    0 => at + rng.u64(..64),
                    1 => at + 4 * rng.u64(..16),
                    _ => at,
                };
                let place = (place(&mut rng, at.0), place(&mut rng, at.1), copy);
                at.0 += place.2.src_end().next_multiple_of(256) + 256;
                at.1 += place.2.dst_end().next_multiple_of(256) + 256;
                place
            })
            .collect();
        seen.extend(descs(&check(&copies)).iter().map(|desc| (desc.tiles, desc.path, desc.store & STORE_WIDE)));
    }
    // Every path of rows but the rare wide casts, and every one of tiles with each way to store.
    let rows = (0..5).chain(CAST..CAST_WIDE).chain(CAST_ODD..CAST_ODD + 4).map(|path| (0, path, 0));
    let tiles = (0..4).chain([UNITS]).chain(CAST..CAST_WIDE).flat_map(|path| [(1, path, 0), (1, path, STORE_WIDE)]);
    let missing: Vec<_> = rows.chain(tiles).filter(|path| !seen.contains(path)).collect();
    assert_eq!(missing, []);
}

#[test]
fn rows_of_all_lengths_and_alignments() {
    for run in (1_u64..40).chain([100, 255, 256, 257, 300, 1000]) {
        for (skew, turn) in [(0, 0), (3, 3), (4, 12), (8, 0), (15, 14), (16, 1)] {
            for pitch in [run, run.next_multiple_of(16), run + 1] {
                let axes = smallvec![CopyAxis { extent: 5, src: pitch + 16, dst: pitch }];
                check(&[(0x1000 + skew, 0x8000 + turn, StridedCopy { src: 0, dst: 0, item: 1, run, axes, convert: None })]);
            }
        }
    }
}

/// Rows that are cast take wide accesses where they can, elements else, and bytes where elements lie at odd addresses.
#[test]
fn casts_of_rows() {
    let floats = [Float::F32, Float::F16, Float::Bf16];
    for (from, to) in floats.iter().flat_map(|from| floats.iter().map(move |to| (*from, *to))) {
        let convert = Convert { from, to, add: 1 };
        let rows = |pitch| StridedCopy::converting(from.item(), Some(convert), 0, 0, [(3, pitch, pitch), (200, 1, 1)]);
        let paths =
            |src, dst, pitch| descs(&check(&[(src, dst, rows(pitch))])).iter().map(|d| d.path - cast(convert)).collect::<Vec<_>>();
        assert_eq!(paths(0x1000, 0x8000, 208), [CAST_WIDE]);
        assert_eq!(paths(0x1000, 0x8000, 201), [CAST]);
        assert_eq!(paths(0x1001, 0x8000, 208), [CAST_ODD]);
        let (src, dst) = (0x1000 + u64::from(from.item()), 0x8000 + u64::from(to.item()));
        assert_eq!(paths(src, dst, 208), [CAST, CAST_WIDE, CAST]);
    }
}

/// Both ends aligned alike: three descriptors, the middle one of 16 bytes.
#[test]
fn a_row_that_begins_between_units_is_cut() {
    let copy = StridedCopy { src: 0, dst: 0, item: 1, run: 1001, axes: smallvec![], convert: None };
    let parts = descs(&check(&[(0x1003, 0x9013, copy)]));
    assert_eq!(parts.iter().map(|d| (d.path, d.items)).collect::<Vec<_>>(), [(0, 13), (4, 61), (2, 3)]);
}

#[test]
fn large_moves_are_the_drivers() {
    let run = LARGE + 1;
    let copy = StridedCopy { src: 0, dst: 0, item: 1, run, axes: smallvec![], convert: None };
    let list = Descriptors::of([(7, 9, &copy)].into_iter());
    assert_eq!((list.copies.as_slice(), list.chunks, list.count(), list.bytes().len()), ([(9, 7, run)].as_slice(), 0, 0, 0));
    let smaller = StridedCopy { run: LARGE - 16, ..copy };
    assert!(Descriptors::of([(16, 16, &smaller)].into_iter()).copies.is_empty());
}

/// A stream takes only so many calls: of many large moves the kernel does the rest.
#[test]
fn few_moves_are_the_drivers() {
    let copy = StridedCopy { src: 0, dst: 0, item: 1, run: LARGE, axes: smallvec![], convert: None };
    let at = |i: u64| (i * 2 * LARGE, (i * 2 + 1) * LARGE);
    let list = Descriptors::of((0..100).map(|i| (at(i).0, at(i).1, &copy)));
    assert_eq!(list.copies.len(), 64);
    let mut moved: Vec<_> = list.copies.iter().map(|&(dst, src, bytes)| (src, dst, bytes)).collect();
    moved.extend(descs(&list).iter().map(|d| (d.src, d.dst, u64::from(d.items) * UNIT)));
    assert_eq!(moved, (0..100).map(|i| (at(i).0, at(i).1, LARGE)).collect::<Vec<_>>());
}

#[test]
fn nothing_to_do() {
    let empty = StridedCopy { src: 0, dst: 0, item: 1, run: 0, axes: smallvec![], convert: None };
    let none = StridedCopy { run: 4, axes: smallvec![CopyAxis { extent: 0, src: 4, dst: 4 }], ..empty.clone() };
    let list = Descriptors::of([(0, 0, &empty), (0, 0, &none)].into_iter());
    assert_eq!((list.chunks, list.count(), list.copies.len()), (0, 0, 0));
}

/// Moves whose offsets no 31 bits hold are cut; all of it is there once.
#[test]
fn spans_beyond_32_bits() {
    let cast = Convert { from: Float::F32, to: Float::Bf16, add: 1 };
    let cases = [
        StridedCopy::new(2, 0, 0, [(3, 1 << 33, 8), (8, 1, 1)]),
        StridedCopy::new(2, 0, 0, [(1 << 17, 9 << 15, 1 << 14), (1 << 14, 1, 1)]),
        StridedCopy::new(2, 0, 0, [(50_000, 1, 100_000), (100_000, 50_000, 1)]),
        StridedCopy::converting(4, Some(cast), 0, 0, [(5 << 29, 1, 1)]),
        StridedCopy::converting(4, Some(cast), 0, 0, [(40_000, 1, 40_000), (40_000, 40_000, 1)]),
    ];
    for copy in cases {
        let list = Descriptors::of([(1 << 40, 1 << 41, &copy)].into_iter());
        let mut bytes = 0;
        for desc in descs(&list) {
            let (convert, src_item, dst_item) = conversion(&desc);
            // Which also checks that they lie within the limit.
            [0, desc.items - 1].into_iter().for_each(|n| item(&mut vec![], &desc, n));
            let elements = match desc.tiles {
                1 => {
                    let outer = desc.axes[2..desc.rank as usize].iter().map(|axis| u64::from(axis.extent)).product::<u64>();
                    u64::from(desc.s_extent)
                        * u64::from(desc.d_extent)
                        * outer
                        * if convert.is_none() { 1 << (desc.store & 7) } else { 1 }
                }
                _ => {
                    u64::from(desc.items) * if convert.is_none() { 1 << desc.path } else { access(&desc) / src_item.max(dst_item) }
                }
            };
            bytes += elements * src_item;
        }
        assert_eq!(bytes, copy.bytes(), "{copy:?}");
        assert!(list.count() < 1000, "{} descriptors of {copy:?}", list.count());
    }
}

/// Of each descriptor, the cost of a chunk and of all.
fn costs(list: &Descriptors) -> Vec<(u64, u64)> {
    descs(list).iter().map(|desc| (cost(desc) / u64::from(desc.items) * u64::from(desc.per_chunk), cost(desc))).collect()
}

#[test]
fn chunks_are_of_equal_cost() {
    let row = |bytes| StridedCopy { src: 0, dst: 0, item: 1, run: bytes, axes: smallvec![], convert: None };
    // One matrix in rows of 8 KiB, 1 GiB in all, and ten thousand norms of 8 KiB.
    let matrix = StridedCopy { axes: smallvec![CopyAxis { extent: 1 << 17, src: 16 << 10, dst: 8 << 10 }], ..row(8 << 10) };
    let norm = row(8 << 10);
    let copies = std::iter::once(&matrix).chain(std::iter::repeat_n(&norm, 10_000)).map(|copy| (1 << 40, 1 << 41, copy));
    let list = Descriptors::of(copies);
    assert_eq!((list.count(), list.chunks), (10_001, (1 << 14) + 10_000));
    assert!(costs(&list).iter().all(|(chunk, all)| *chunk <= CHUNK_COST.1 && (chunk == all || *chunk > CHUNK_COST.1 / 2)));
    // Little work is spread, but not thinner than pays.
    let small = row(1 << 20);
    let list = Descriptors::of([(0, 0, &small)].into_iter());
    assert_eq!(list.chunks, 256);
    // A transpose of 64 MiB: one tile of 16 KiB each, or a few.
    let turned = StridedCopy::new(2, 0, 0, [(8192, 1, 4096), (4096, 8192, 1)]);
    let list = Descriptors::of([(0, 0, &turned)].into_iter());
    assert_eq!((descs(&list)[0].items, list.chunks), (4096, 4096 / 2));
}

/// copy.cu's structures, read, against the Rust ones: names and offsets of all fields.
#[test]
fn the_kernel_has_the_same_layout() {
    let source = include_str!("../../kernels/copy.cu");
    let fields = |name: &str| -> (Vec<(String, usize)>, usize) {
        let body = source.split(&format!("struct {name} {{")).nth(1).unwrap().split("};").next().unwrap();
        let (mut fields, mut at) = (vec![], 0);
        for line in body.lines().map(|line| line.split("//").next().unwrap().trim()).filter(|line| !line.is_empty()) {
            let (kind, names) = line.trim_end_matches(';').split_once(' ').unwrap();
            let size = match kind {
                "u64" => 8,
                "u32" | "float" => 4,
                "Axis" => 20 * AXES,
                other => panic!("{other}"),
            };
            for name in names.split(',') {
                fields.push((name.trim().replace("[6]", ""), at));
                at += size;
            }
        }
        (fields, at)
    };
    macro_rules! ours {
        ($of:ident: $($field:ident)*) => { vec![$((stringify!($field).to_string(), offset_of!($of, $field))),*] };
    }
    assert_eq!(fields("Axis"), (ours!(Axis: extent magic shift src dst), size_of::<Axis>()));
    let desc = ours!(Desc: src dst items per_chunk path rank add src_f16 dst_f16 store tiles
        s_extent d_extent s_src s_dst d_src d_dst zero axes);
    assert_eq!(fields("Desc"), (desc, size_of::<Desc>()));
    let mut bytes = vec![];
    Desc { axes: [Axis::new(7, 8, 9); AXES], d_dst: 5, add: -0.0, ..Desc::default() }.put(&mut bytes);
    assert_eq!(bytes.len(), size_of::<Desc>());
    assert_eq!(word(&bytes, offset_of!(Desc, d_dst)), 5);
    assert_eq!(word(&bytes, offset_of!(Desc, add)), 1 << 31);
    assert_eq!(word(&bytes, offset_of!(Desc, axes) + offset_of!(Axis, dst)), 9);
    for (line, value) in
        [("#define BLOCK ", BLOCK), ("#define STORE_WIDE ", STORE_WIDE), ("#define TILE_ROWS ", 128), ("#define ROW ", 128)]
    {
        let text = source.split(line).nth(1).unwrap().split('u').next().unwrap();
        assert_eq!(text.parse::<u32>().unwrap(), value, "{line}");
    }
    let body = source.split("enum Path : u32 {").nth(1).unwrap().split("};").next().unwrap();
    let mut number = 0;
    let names =
        body.lines().flat_map(|line| line.split("//").next().unwrap().split(',')).map(str::trim).filter(|name| !name.is_empty());
    let paths: Vec<(&str, u32)> = names
        .map(|name| {
            let (name, value) = name.split_once(" = ").unwrap_or((name, ""));
            number = value.parse().unwrap_or(number) + 1;
            (name, number - 1)
        })
        .collect();
    let wanted = [("COPY_1", 0), ("COPY_16", 4), ("UNITS", UNITS), ("CAST_22", CAST), ("WIDE_22", CAST_WIDE), ("ODD_22", CAST_ODD)];
    assert!(wanted.iter().all(|path| paths.contains(path)), "{paths:?}");
    for kind in ["CAST", "WIDE", "ODD"] {
        let casts: Vec<_> =
            paths.iter().filter(|path| path.0.starts_with(kind)).map(|path| path.0.rsplit('_').next().unwrap()).collect();
        assert_eq!(casts, ["22", "24", "42", "44"]);
    }
}
