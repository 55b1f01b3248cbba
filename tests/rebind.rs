//! What stays known of memory when a container is bound anew, and what a failed communicator means for one.

use reshard::abi::*;
use reshard::comm::{Comm, Deadline, loopback};
use reshard::container::{Config, Container, Sync};
use reshard::device::Mem;
use reshard::layout::{BufferRow, Layout, TensorRow, TileRow};
use std::sync::Arc;
use std::time::Duration;

const N: usize = 4 << 20;

fn pad(n: i64) -> [i64; RS_MAX_RANK] {
    let mut out = [0; RS_MAX_RANK];
    out[0] = n;
    out
}

/// Whole one-dimensional buffers, each a tensor of its own name.
fn layout(names: &[&str], role: u32, memory: &mut [Vec<u16>]) -> (Layout, Vec<Mem>) {
    let (mut tensors, mut buffers, mut tiles, mut mems) = (vec![], vec![], vec![], vec![]);
    for (i, (name, m)) in names.iter().zip(memory).enumerate() {
        let n = m.len() as i64;
        // SAFETY: the tests keep the memory longer than the container, and do not touch it during a sync.
        let mem = unsafe { Mem::new(m.as_mut_ptr().cast(), m.len() * 2) };
        tensors.push(TensorRow { name: name.to_string(), shape: vec![n] });
        buffers.push(BufferRow {
            name: name.to_string(),
            addr: mem.addr() as u64,
            bytes: mem.len() as u64,
            device_type: RS_DEVICE_CPU,
            device_id: 0,
            role,
            flags: 0,
            dtype: rs_dtype_t { code: 4, bits: 16, lanes: 1 },
            shape: vec![n],
            strides: vec![1],
        });
        let (tensor, buffer) = (i as u32, i as u32);
        let (view, origin, extent, stride) = (pad(n), pad(0), pad(n), pad(1));
        tiles.push(TileRow { tensor, buffer, rank: 1, transform: 0, byte_offset: 0, view, origin, extent, stride });
        mems.push(mem);
    }
    (Layout::new(&tensors, &buffers, &tiles).unwrap(), mems)
}

fn container(comm: Arc<dyn Comm>, names: &[&str], role: u32, memory: &mut [Vec<u16>]) -> Container {
    let (layout, mems) = layout(names, role, memory);
    let timeout = Duration::from_secs(20);
    let config = Config {
        label: String::new(),
        device: None,
        host_id: None,
        relays: false,
        staging: 1 << 20,
        staging_at: None,
        threads: 1,
        timeout,
        comm: Some(comm),
    };
    Container::new(config, layout, mems, None).unwrap()
}

fn version(version: u64) -> Sync {
    Sync { version, ..Sync::default() }
}

#[test]
fn torn_memory_stays_torn_whatever_it_is_called() {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut memory = [vec![1; N], vec![1; 8]];
            let mut c = container(loopback::join(81, 0, 2).unwrap(), &["w", "v"], RS_SOURCE, &mut memory);
            c.connect().unwrap();
            c.sync(&version(1), &mut |_, _| {}).unwrap_err();
        });
        let mut memory = [vec![0u16; N], vec![0; 8]];
        let mut c = container(loopback::join(81, 1, 2).unwrap(), &["w", "v"], RS_TARGET, &mut memory);
        c.connect().unwrap();
        let control = c.control();
        let e = c.sync(&version(1), &mut |_, _| control.abort("enough")).unwrap_err();
        assert_eq!(e.status(), RS_ERR_ABORTED, "{e}");
        assert_eq!(c.param("w").unwrap_err().status(), RS_ERR_TORN);

        // A fresh buffer beside it, other boxes.
        let [w, v] = memory;
        let mut memory = [w, v, vec![0u16; 8]];
        let (other, mems) = layout(&["w", "v", "u"], RS_TARGET, &mut memory);
        c.rebind(other, mems, None).unwrap();
        assert_eq!(c.param("w").unwrap_err().status(), RS_ERR_TORN);
        assert_eq!(c.param("u").unwrap().state, RS_PARAM_INITIAL);
        // The same memory under another name.
        let (other, mems) = layout(&["renamed", "v", "u"], RS_TARGET, &mut memory);
        c.rebind(other, mems, None).unwrap();
        assert_eq!(c.param("renamed").unwrap_err().status(), RS_ERR_TORN);
        // Other memory under the old name.
        let mut fresh = [vec![0u16; N], vec![0; 8], vec![0; 8]];
        let (other, mems) = layout(&["renamed", "v", "u"], RS_TARGET, &mut fresh);
        c.rebind(other, mems, None).unwrap();
        assert_eq!(c.param("renamed").unwrap().state, RS_PARAM_INITIAL);
        drop(c);
        drop(memory);
    });
}

#[test]
fn a_container_whose_communicator_ended_says_so() {
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let comm = loopback::join(82, 0, 2).unwrap();
            let mut memory = [vec![1; 8]];
            let mut c = container(comm.clone(), &["w"], RS_SOURCE, &mut memory);
            c.connect().unwrap();
            // A collective that the other rank does not make.
            let _ = comm.allgather(&[0; 3], Deadline::after(Duration::from_secs(20)));
        });
        let mut memory = [vec![0u16; 8]];
        let mut c = container(loopback::join(82, 1, 2).unwrap(), &["w"], RS_TARGET, &mut memory);
        c.connect().unwrap();
        let e = c.sync(&version(1), &mut |_, _| {}).unwrap_err();
        assert!(e.status() <= RS_ERR_TIMEOUT, "{} {e}", e.status());
        let e = c.sync(&version(1), &mut |_, _| {}).unwrap_err();
        assert_eq!(e.status(), RS_ERR_STATE, "{e}");
        assert!(e.text().contains("rs_container_set_comm"), "{e}");
        assert_eq!(memory[0], [0; 8]);
        other.join().unwrap();
    });
}
