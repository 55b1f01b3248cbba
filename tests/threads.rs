//! No thread of the library outlives a call, and a sync does use the threads that it was given.
//!
//! Alone in its process, so that the threads counted are its own.

use reshard::abi::*;
use reshard::comm::{Comm, loopback};
use reshard::container::{Config, Container, Sync};
use reshard::device::host::HostDevice;
use reshard::device::{Copies, CopyNow, Device, Event, Job, Mem, Stream};
use reshard::error::Result;
use reshard::layout::{BufferRow, Layout, TensorRow, TileRow};
use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::Duration;

const SIDE: i64 = 4096;

/// The host device, which notes the threads that copy.
struct Noting {
    host: HostDevice,
    seen: Mutex<HashSet<ThreadId>>,
}

impl Device for Noting {
    fn converts(&self) -> bool {
        true
    }
    fn name(&self) -> &str {
        "noting"
    }
    fn id(&self) -> (i32, i32) {
        self.host.id()
    }
    fn alloc(&self, bytes: usize) -> Result<Mem> {
        self.host.alloc(bytes)
    }
    fn free(&self, mem: Mem) {
        self.host.free(mem);
    }
    fn copies(&self) -> Copies<'_> {
        Copies::AsTheyAre(self)
    }
    fn record(&self, stream: Stream) -> Result<Event> {
        self.host.record(stream)
    }
    fn query(&self, event: &Event) -> Result<bool> {
        self.host.query(event)
    }
    fn wait(&self, stream: Stream, event: &Event) -> Result<()> {
        self.host.wait(stream, event)
    }
    fn forget(&self, event: Event) {
        self.host.forget(event);
    }
}

impl CopyNow for Noting {
    fn copy(&self, jobs: &[Job<'_>], stream: Stream) -> Result<()> {
        self.seen.lock().unwrap().insert(std::thread::current().id());
        // Long enough for every thread to take its share, however busy the machine.
        std::thread::sleep(Duration::from_millis(5));
        self.host.copy(jobs, stream)
    }
}

fn pad(v: [i64; 2]) -> [i64; RS_MAX_RANK] {
    let mut out = [0; RS_MAX_RANK];
    out[..2].copy_from_slice(&v);
    out
}

fn rank(comm: Arc<dyn Comm>, device: Arc<Noting>, role: u32, memory: &mut [u16]) -> Container {
    // SAFETY: the caller keeps the memory until the container is gone, and does not touch it during a sync.
    let mem = unsafe { Mem::new(memory.as_mut_ptr().cast(), memory.len() * 2) };
    let tensors = [TensorRow { name: "w".into(), shape: vec![SIDE, SIDE] }];
    let buffers = [BufferRow {
        name: "p".into(),
        addr: mem.addr() as u64,
        bytes: mem.len() as u64,
        device_type: RS_DEVICE_CPU,
        device_id: 0,
        role,
        flags: 0,
        dtype: rs_dtype_t { code: 4, bits: 16, lanes: 1 },
        shape: vec![SIDE, SIDE],
        strides: vec![SIDE, 1],
    }];
    let whole = TileRow {
        tensor: 0,
        buffer: 0,
        rank: 2,
        transform: RS_TRANSFORM_NONE,
        byte_offset: 0,
        view: pad([SIDE, SIDE]),
        origin: pad([0, 0]),
        extent: pad([SIDE, SIDE]),
        stride: pad([SIDE, 1]),
    };
    let layout = Layout::new(&tensors, &buffers, &[whole]).unwrap();
    let timeout = Duration::from_secs(20);
    let config = Config {
        label: String::new(),
        device: Some(device),
        host_id: None,
        relays: false,
        staging: 1 << 20,
        staging_at: None,
        threads: 4,
        timeout,
        comm: Some(comm),
    };
    let mut out = Container::new(config, layout, vec![mem], None).unwrap();
    out.connect().unwrap();
    out
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

#[test]
fn no_thread_outlives_a_call() {
    let device = || Arc::new(Noting { host: HostDevice::new(), seen: Mutex::default() });
    let (one, two) = (device(), device());
    let noted = two.clone();
    let before = threads();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut memory: Vec<u16> = (0..(SIDE * SIDE) as usize).map(|i| i as u16).collect();
            let mut c = rank(loopback::join(71, 0, 2).unwrap(), one, RS_SOURCE, &mut memory);
            c.sync(&Sync { version: 1, ..Sync::default() }, &mut |_, _| {}).unwrap();
        });
        let mut memory = vec![0u16; (SIDE * SIDE) as usize];
        let mut c = rank(loopback::join(71, 1, 2).unwrap(), two, RS_TARGET, &mut memory);
        c.sync(&Sync { version: 1, ..Sync::default() }, &mut |_, _| {}).unwrap();
        drop(c);
        assert!(memory.iter().enumerate().all(|(i, &x)| x == i as u16));
    });
    // The kernel takes a moment to forget a thread that was joined.
    let mut left = threads();
    for _ in 0..100 {
        if left == before {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
        left = threads();
    }
    assert_eq!(left, before, "a thread is left");
    assert_eq!(noted.seen.lock().unwrap().len(), 4, "host_threads is 4");
}
