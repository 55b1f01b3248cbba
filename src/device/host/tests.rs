//! Every shape against a copy of one byte at a time, on the detected path and on the portable one, streaming or not.
use super::*;
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
            let copy = StridedCopy { src: 3, dst: 5, item: 1, run, axes };
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
    let copy = |at| StridedCopy { src: at, dst: 63 - at, item: 1, run: 1, axes: smallvec![] };
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
    let copy = StridedCopy { src: 0, dst: 1, item: 1, run: 64, axes: smallvec![] };
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
