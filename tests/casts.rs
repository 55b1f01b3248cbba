//! Casts that cannot be had are refused by name, before a byte moves. (That casts are right is for `properties` and the host device.)

use reshard::abi::*;
use reshard::comm::{Comm, loopback};
use reshard::container::{Config, Container};
use reshard::device::host::HostDevice;
use reshard::device::{Copies, CopyNow, Device, Event, Job, Mem, Stream};
use reshard::error::Result;
use reshard::layout::{BufferRow, Layout, TensorRow, TileRow};
use std::sync::Arc;
use std::time::Duration;

const BF16: rs_dtype_t = rs_dtype_t { code: 4, bits: 16, lanes: 1 };
const FP32: rs_dtype_t = rs_dtype_t { code: 2, bits: 32, lanes: 1 };
const LEN: i64 = 12;

/// The host device without its conversions.
struct Plain(HostDevice);

impl Device for Plain {
    fn name(&self) -> &str {
        "plain"
    }
    fn id(&self) -> (i32, i32) {
        self.0.id()
    }
    fn converts(&self) -> bool {
        false
    }
    fn alloc(&self, bytes: usize) -> Result<Mem> {
        self.0.alloc(bytes)
    }
    fn free(&self, mem: Mem) {
        self.0.free(mem);
    }
    fn copies(&self) -> Copies<'_> {
        Copies::AsTheyAre(self)
    }
    fn record(&self, stream: Stream) -> Result<Event> {
        self.0.record(stream)
    }
    fn query(&self, event: &Event) -> Result<bool> {
        self.0.query(event)
    }
    fn wait(&self, stream: Stream, event: &Event) -> Result<()> {
        self.0.wait(stream, event)
    }
    fn forget(&self, event: Event) {
        self.0.forget(event);
    }
}

impl CopyNow for Plain {
    fn copy(&self, jobs: &[Job<'_>], stream: Stream) -> Result<()> {
        assert!(jobs.iter().all(|j| j.copy().convert.is_none()));
        self.0.copy(jobs, stream)
    }
}

/// A rank that has all of tensor `w` in each of its buffers, given as name, role, dtype and transform.
fn connect(comm: Arc<dyn Comm>, device: Arc<dyn Device>, buffers: &[(&str, u32, rs_dtype_t, u32)]) -> Result<()> {
    let mut memory: Vec<Vec<u64>> = buffers.iter().map(|_| vec![0xA5A5_A5A5; LEN as usize]).collect();
    // SAFETY: the memory outlives the container.
    let mems: Vec<Mem> = memory.iter_mut().map(|m| unsafe { Mem::new(m.as_mut_ptr().cast(), m.len() * 8) }).collect();
    let one = |n: i64| {
        let mut out = [0; RS_MAX_RANK];
        out[0] = n;
        out
    };
    let row = |(i, &(name, role, dtype, _)): (usize, &(&str, u32, rs_dtype_t, u32))| BufferRow {
        name: name.into(),
        addr: mems[i].addr() as u64,
        bytes: mems[i].len() as u64,
        device_type: RS_DEVICE_CPU,
        device_id: 0,
        role,
        flags: 0,
        dtype,
        shape: vec![LEN],
        strides: vec![1],
    };
    let tile = |(i, b): (u32, &(&str, u32, rs_dtype_t, u32))| TileRow {
        tensor: 0,
        buffer: i,
        rank: 1,
        transform: b.3,
        byte_offset: 0,
        view: one(LEN),
        origin: one(0),
        extent: one(LEN),
        stride: one(1),
    };
    let rows: Vec<BufferRow> = buffers.iter().enumerate().map(row).collect();
    let tiles: Vec<TileRow> = (0..).zip(buffers).map(tile).collect();
    let layout = Layout::new(&[TensorRow { name: "w".into(), shape: vec![LEN] }], &rows, &tiles)?;
    let timeout = Duration::from_secs(20);
    let config = Config {
        label: String::new(),
        device: Some(device),
        host_id: None,
        relays: false,
        staging: 1 << 20,
        staging_at: None,
        threads: 1,
        timeout,
        comm: Some(comm),
    };
    let out = Container::new(config, layout, mems, None).and_then(|mut c| c.connect());
    assert!(memory.iter().flatten().all(|&x| x == 0xA5A5_A5A5), "connect wrote");
    out
}

fn refused(result: Result<()>, status: rs_status_t, words: &[&str]) {
    let e = result.expect_err("must be refused");
    assert_eq!(e.status(), status, "{e}");
    words.iter().for_each(|w| assert!(e.text().contains(w), "'{w}' is not in: {e}"));
}

#[test]
fn a_device_that_does_not_convert_is_not_asked_to() {
    let words = ["'q'", "plain", "RS_DEVICE_CONVERTS"];
    let plain = || Arc::new(Plain(HostDevice::new()));
    let source = ("p", RS_SOURCE, FP32, RS_TRANSFORM_NONE);
    for target in [("q", RS_TARGET, BF16, RS_TRANSFORM_NONE), ("q", RS_TARGET, FP32, RS_TRANSFORM_PLUS_ONE)] {
        // Inside a rank.
        let comm = loopback::join(910, 0, 1).unwrap();
        refused(connect(comm, plain(), &[source, target]), RS_ERR_UNSUPPORTED, &words);
        // From another; that one hears of it.
        std::thread::scope(|scope| {
            let other = scope.spawn(|| connect(loopback::join(911, 0, 2).unwrap(), Arc::new(HostDevice::new()), &[source]));
            refused(connect(loopback::join(911, 1, 2).unwrap(), plain(), &[target]), RS_ERR_UNSUPPORTED, &words);
            refused(other.join().unwrap(), RS_ERR_UNSUPPORTED, &words);
        });
        // A source's device need not convert.
        std::thread::scope(|scope| {
            let other = scope.spawn(|| connect(loopback::join(912, 0, 2).unwrap(), plain(), &[source]));
            connect(loopback::join(912, 1, 2).unwrap(), Arc::new(HostDevice::new()), &[target]).unwrap();
            other.join().unwrap().unwrap();
        });
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let host = || Arc::new(HostDevice::new());
    let int = rs_dtype_t { code: 0, bits: 32, lanes: 1 };
    for (source, words) in [(int, "code 0, bits 32"), (rs_dtype_t { code: 2, bits: 64, lanes: 1 }, "code 2, bits 64")] {
        let buffers = [("p", RS_SOURCE, source, 0), ("q", RS_TARGET, FP32, 0)];
        refused(connect(loopback::join(913, 0, 1).unwrap(), host(), &buffers), RS_ERR_MISMATCH, &["'w'", "'p'", "'q'", words]);
    }
    // Two targets of one rank that want a foreign element in two ways.
    std::thread::scope(|scope| {
        let other = scope.spawn(|| connect(loopback::join(914, 0, 2).unwrap(), host(), &[("p", RS_SOURCE, FP32, 0)]));
        let targets = [("q", RS_TARGET, FP32, 0), ("r", RS_TARGET, BF16, 0)];
        let words = ["'w'", "'q'", "'r'", "different dtypes"];
        refused(connect(loopback::join(914, 1, 2).unwrap(), host(), &targets), RS_ERR_UNSUPPORTED, &words);
        refused(other.join().unwrap(), RS_ERR_UNSUPPORTED, &words);
    });
}
