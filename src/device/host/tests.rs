//! Every shape against a copy of one byte at a time, on the detected path and on the portable one, streaming or not.
use super::*;
use crate::convert::{Convert, Float};
use crate::geom::StridedCopy;
use smallvec::smallvec;

/// What every byte around a target must still be afterwards.
const CANARY: u8 = 0xA5;
/// Bytes around.
const MARGIN: usize = 200;

/// Copies byte by byte, in the plainest way there is: every combination of steps as one number, taken apart.
fn naive(copy: &StridedCopy, src: &[u8], dst: &mut [u8]) {
    let count: u64 = copy.axes.iter().map(|axis| axis.extent).product();
    for n in 0..count {
        let (mut rest, mut from, mut to) = (n, copy.src, copy.dst);
        for axis in &copy.axes {
            from += rest % axis.extent * axis.src;
            to += rest % axis.extent * axis.dst;
            rest /= axis.extent;
        }
        for byte in 0..copy.run {
            dst[(to + byte) as usize] = src[(from + byte) as usize];
        }
    }
}

/// Runs `copy` on each path, with the source `skew` bytes into its block and the target `turn` bytes.
fn check(copy: &StridedCopy, skew: usize, turn: usize, seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let from: Vec<u8> = (0..copy.src_end()).map(|_| rng.u8(..)).collect();
    let mut expected = vec![CANARY; 2 * MARGIN + copy.dst_end() as usize];
    naive(copy, &from, &mut expected[MARGIN..]);
    for device in [HostDevice::new(), HostDevice::portable()] {
        let src = device.alloc(skew + from.len()).unwrap();
        let dst = device.alloc(turn + expected.len()).unwrap();
        for stream in [false, true] {
            // SAFETY: two allocations of these lengths that nothing else uses.
            unsafe {
                ptr::copy_nonoverlapping(from.as_ptr(), (src.addr() + skew) as *mut u8, from.len());
                ptr::write_bytes((dst.addr() + turn) as *mut u8, CANARY, expected.len());
            }
            let job = Job::new(src.cut(skew, from.len()).unwrap(), dst.cut(turn + MARGIN, copy.dst_end() as usize).unwrap(), copy);
            let job = if stream { job.unwrap().streaming() } else { job.unwrap() };
            device.copy(&[job], 0).unwrap();
            // SAFETY: written in full above; nobody writes it while the slice lives.
            let got = unsafe { std::slice::from_raw_parts((dst.addr() + turn) as *const u8, expected.len()) };
            if got != expected {
                let at = got.iter().zip(&expected).position(|(a, b)| a != b).unwrap();
                panic!(
                    "{:?} stream {stream} skew {skew} turn {turn}: byte {} differs: {copy:?}",
                    device.path,
                    at as i64 - MARGIN as i64
                );
            }
        }
        device.free(src);
        device.free(dst);
    }
}

/// Elements over `shape`, each side in its own axis order, with gaps between some of the axes.
fn random(rng: &mut fastrand::Rng, item: u32, shape: &[u64]) -> StridedCopy {
    let mut strides = || {
        let mut order: Vec<usize> = (0..shape.len()).collect();
        rng.shuffle(&mut order);
        let mut strides = vec![0; shape.len()];
        let mut next = if rng.u8(..4) == 0 { rng.u64(2..4) } else { 1 };
        for axis in order {
            strides[axis] = next;
            next *= shape[axis];
            if rng.u8(..3) == 0 {
                next += rng.u64(1..40);
            }
        }
        strides
    };
    let (src, dst) = (strides(), strides());
    let at = (rng.u64(..5), rng.u64(..5));
    StridedCopy::new(item, at.0, at.1, shape.iter().zip(src.iter().zip(&dst)).map(|(n, (s, d))| (*n, *s, *d)))
}

#[test]
fn random_shapes() {
    let cases = if cfg!(debug_assertions) { 1200 } else { 20_000 };
    for seed in 0..cases {
        let mut rng = fastrand::Rng::with_seed(seed);
        let item = rng.choice([1, 2, 4, 8, 16]).unwrap();
        let rank = rng.usize(..6);
        let mut left: u64 = 4000;
        let shape: Vec<u64> = (0..rank)
            .map(|_| {
                let n = if rng.bool() { rng.u64(1..8) } else { rng.u64(1..=left.clamp(1, 300)) };
                left = (left / n).max(1);
                n
            })
            .collect();
        let copy = random(&mut rng, item, &shape);
        check(&copy, rng.usize(..70), rng.usize(..70), seed);
    }
}

/// Rows of every length around the limits between the loops, at every alignment that matters.
#[test]
fn rows_of_all_lengths() {
    for run in (1..140).chain([255, 256, 511, 512, 513, 1000, 1024, 4096, 16_000, 16_383, 16_384, 16_385, 50_001, 70_000]) {
        for (rows, gap) in [(1, 0), (3, 1), (4, 64), (9, 37)] {
            let axes = if rows == 1 { smallvec![] } else { smallvec![CopyAxis { extent: rows, src: run + gap, dst: run + gap }] };
            let copy = StridedCopy { src: 3, dst: 5, item: 1, run, axes, convert: None };
            check(&copy, 0, 0, run);
            check(&copy, 61, 59, run);
        }
    }
}

/// Transposes of every item around the limits of squares and tiles.
#[test]
fn transposes_of_all_sizes() {
    for item in [1_u32, 2, 4, 8, 16] {
        for (rows, columns) in
            [(2_u64, 2_u64), (7, 9), (8, 8), (15, 17), (16, 16), (31, 33), (32, 64), (64, 32), (65, 130), (130, 200)]
        {
            for turn in [0, 2, 17, 64 - u64::from(item)] {
                // The target's rows once dense, once at whole lines, once in between.
                for pitch in [columns, columns.next_multiple_of(64), columns + 1] {
                    let copy = StridedCopy::new(item, 0, 0, [(rows, 1, pitch), (columns, rows + 3, 1)]);
                    check(&copy, 1, turn as usize, turn);
                }
            }
        }
    }
}

#[test]
fn the_machine_that_runs_this_tests_both_paths() {
    assert_eq!(HostDevice::portable().path, Path::Portable);
    #[cfg(target_arch = "x86_64")]
    assert_eq!(HostDevice::default().path == Path::Avx2, is_x86_feature_detected!("avx2"));
}

#[test]
fn several_jobs_and_none() {
    let device = HostDevice::new();
    device.copy(&[], 0).unwrap();
    let (src, dst) = (device.alloc(64).unwrap(), device.alloc(64).unwrap());
    // SAFETY: 64 bytes of our own.
    unsafe { ptr::write_bytes(src.addr() as *mut u8, 7, 64) };
    let copy = |at| StridedCopy { src: at, dst: 63 - at, item: 1, run: 1, axes: smallvec![], convert: None };
    let copies: Vec<StridedCopy> = (0..64).map(copy).collect();
    let jobs: Vec<Job<'_>> = copies.iter().map(|copy| Job::new(src, dst, copy).unwrap()).collect();
    device.copy(&jobs, 0).unwrap();
    // SAFETY: 64 bytes of our own that nobody writes now.
    assert_eq!(unsafe { std::slice::from_raw_parts(dst.addr() as *const u8, 64) }, [7; 64]);
}

#[test]
fn a_copy_outside_its_memory_is_refused() {
    let device = HostDevice::new();
    let mem = device.alloc(64).unwrap();
    let copy = StridedCopy { src: 0, dst: 1, item: 1, run: 64, axes: smallvec![], convert: None };
    assert_eq!(Job::new(mem, mem, &copy).unwrap_err().status(), RS_ERR_INTERNAL);
}

#[test]
fn memory_is_page_aligned_zero_and_given_back() {
    let device = HostDevice::new();
    for bytes in [0, 1, 5000, 3 << 20] {
        let mem = device.alloc(bytes).unwrap();
        assert_eq!((mem.len(), mem.addr() % 4096), (bytes, 0));
        // SAFETY: an allocation of that length.
        assert!(unsafe { std::slice::from_raw_parts(mem.addr() as *const u8, bytes) }.iter().all(|byte| *byte == 0));
        assert_eq!(device.blocks.lock().unwrap().len(), 1);
        device.free(mem);
        assert!(device.blocks.lock().unwrap().is_empty());
    }
    let error = device.alloc(usize::MAX / 2).unwrap_err();
    assert_eq!(error.status(), RS_ERR_MEMORY);
}

#[test]
fn what_was_started_is_done() {
    let device = HostDevice::new();
    assert_eq!((device.name(), device.id()), ("host", (RS_DEVICE_CPU, 0)));
    let event = device.record(0).unwrap();
    device.wait(0, &event).unwrap();
    assert!(device.query(&event).unwrap());
    device.forget(event);
}

/// The value of a type's bits, from its definition; `None`: not a number.
fn value(float: Float, bits: u32) -> Option<f64> {
    let (exponent_bits, fraction_bits) = match float {
        Float::F32 => (8, 23),
        Float::F16 => (5, 10),
        Float::Bf16 => (8, 7),
    };
    let bias = (1 << (exponent_bits - 1)) - 1;
    let fraction = f64::from(bits & ((1 << fraction_bits) - 1)) / f64::from(1 << fraction_bits);
    let exponent = (bits >> fraction_bits & ((1 << exponent_bits) - 1)) as i32;
    let sign = if bits >> (exponent_bits + fraction_bits) & 1 == 1 { -1.0 } else { 1.0 };
    match exponent {
        e if e == (1 << exponent_bits) - 1 => (fraction == 0.0).then_some(sign * f64::INFINITY),
        0 => Some(sign * fraction * 2f64.powi(1 - bias)),
        e => Some(sign * (1.0 + fraction) * 2f64.powi(e - bias)),
    }
}

/// The bits nearest to a value, of two as near the even ones, found by trying: the bits of one sign rise with their values.
fn nearest(float: Float, wanted: f64) -> u32 {
    let (width, infinity) = match float {
        Float::F32 => (32, 0x7F80_0000),
        Float::F16 => (16, 0x7C00),
        Float::Bf16 => (16, 0x7F80),
    };
    let sign = u32::from(wanted.is_sign_negative()) << (width - 1);
    let wanted = wanted.abs();
    let (mut low, mut high) = (0u32, infinity);
    if wanted.is_infinite() {
        return sign | infinity;
    }
    while high - low > 1 {
        let middle = (low + high) / 2;
        if value(float, middle).unwrap() <= wanted { low = middle } else { high = middle }
    }
    // Beyond the largest number the next would be as far from it as that from the one before.
    let below = value(float, low).unwrap();
    let above = if high == infinity { 2.0 * below - value(float, low - 1).unwrap() } else { value(float, high).unwrap() };
    let up = match (wanted - below).total_cmp(&(above - wanted)) {
        std::cmp::Ordering::Less => false,
        std::cmp::Ordering::Greater => true,
        std::cmp::Ordering::Equal => low % 2 == 1,
    };
    sign | if up { high } else { low }
}

fn converted(c: Convert, bits: u32) -> Option<u32> {
    let exact = value(c.from, bits)?;
    if c.add == 0 {
        return Some(nearest(c.to, exact));
    }
    // The sum is a binary32 before it is anything else.
    let sum = value(Float::F32, nearest(Float::F32, exact + f64::from(c.add)))?;
    Some(nearest(c.to, sum))
}

fn bits_of(float: Float, bytes: &[u8]) -> u32 {
    match float {
        Float::F32 => u32::from_le_bytes(bytes.try_into().unwrap()),
        _ => u32::from(u16::from_le_bytes(bytes.try_into().unwrap())),
    }
}

fn sample(float: Float, rng: &mut fastrand::Rng) -> Vec<u32> {
    match float {
        Float::F32 => {
            // Around ties of both narrow types, subnormals, limits, and anything.
            let near = |n: u32| [n.wrapping_sub(1), n, n.wrapping_add(1)];
            let specials = [0, 1, 0x7F80_0000, 0xFF80_0000, 0x7F80_0001, 0x7FFF_FFFF, 0x3380_0000, 0x477F_F000, 0x7F7F_8000];
            let mut out: Vec<u32> = specials.into_iter().flat_map(near).collect();
            out.extend((0..3000).flat_map(|_| near(rng.u32(..) & 0xFFFF_0000 | 0x8000)));
            out.extend((0..3000).flat_map(|_| near((rng.u32(0x3300_0000..0x4800_0000)) & 0xFFFF_E000 | 0x1000)));
            out.extend((0..3000).map(|_| rng.u32(..)));
            out
        }
        _ => (0..=0xFFFF).collect(),
    }
}

/// Every cast of every value of the narrow types and of many of fp32, in runs, with strides, turned, at odd addresses.
#[test]
fn values_are_rounded_to_the_nearest() {
    let mut rng = fastrand::Rng::with_seed(9);
    let floats = [Float::F32, Float::F16, Float::Bf16];
    for (from, to, add) in floats.iter().flat_map(|&f| floats.iter().flat_map(move |&t| [0, 1, -1].map(|a| (f, t, a)))) {
        let convert = Convert { from, to, add };
        let bits = sample(from, &mut rng);
        let [src_item, dst_item] = [from, to].map(|f| f.item() as usize);
        let expected: Vec<Option<u32>> = bits.iter().map(|&b| converted(convert, b)).collect();
        let n = bits.len() as u64 / 6 * 6;
        for axes in [
            vec![(n, 1, 1)],
            vec![(n / 2, 2, 1), (2, 1, n / 2)],
            vec![(n / 3, 3, 5), (3, 1, 1)],
            vec![(n / 30, 30, 31), (30, 1, 1)],
            vec![(n / 900, 900, 901), (900, 1, 1)],
            vec![(n, 1, 3)],
        ] {
            let copy = StridedCopy::converting(from.item(), Some(convert), 0, 0, axes.clone());
            let source: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()[..src_item].to_vec()).collect();
            let device = HostDevice::new();
            let src = device.alloc(source.len() + 1).unwrap();
            let dst = device.alloc(copy.dst_end() as usize + 1).unwrap();
            // SAFETY: two allocations of these lengths that nothing else uses.
            unsafe {
                ptr::copy_nonoverlapping(source.as_ptr(), (src.addr() + 1) as *mut u8, source.len());
                ptr::write_bytes(dst.addr() as *mut u8, CANARY, dst.len());
            }
            let (from_mem, to_mem) = (src.cut(1, source.len()).unwrap(), dst.cut(1, dst.len() - 1).unwrap());
            device.copy(&[Job::new(from_mem, to_mem, &copy).unwrap().streaming()], 0).unwrap();
            // SAFETY: written in full above; nobody writes it while the slice lives.
            let got = unsafe { std::slice::from_raw_parts((dst.addr() + 1) as *const u8, dst.len() - 1) };
            let mut written = vec![false; got.len()];
            let steps: u64 = axes.iter().map(|a| a.0).product();
            for k in 0..steps {
                let (mut rest, mut s, mut d) = (k, 0, 0);
                for &(extent, src, dst) in &axes {
                    (s, d) = (s + rest % extent * src, d + rest % extent * dst);
                    rest /= extent;
                }
                let place = d as usize * dst_item..(d as usize + 1) * dst_item;
                let (had, has) = (bits[s as usize], bits_of(to, &got[place.clone()]));
                written[place].fill(true);
                match expected[s as usize] {
                    Some(wanted) => assert_eq!(has, wanted, "{convert:?}: {had:#x} became {has:#x} instead of {wanted:#x}"),
                    None => assert_eq!(value(to, has), None, "{convert:?}: {had:#x}, not a number, became {has:#x}"),
                }
            }
            assert!(got.iter().zip(&written).all(|(&b, &w)| w || b == CANARY), "{convert:?} {axes:?}: wrote between the elements");
            device.free(src);
            device.free(dst);
        }
    }
}
