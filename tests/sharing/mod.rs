//! Trainer and engine as processes of one GPU: the engine reads the trainer's memory through the driver, however that was allocated;
//! where other processes cannot open it, both are told what to do.

mod gone;

use super::*;
use reshard::device::cuda::CudaDevice;
use reshard::device::{Allocation, Device, Export, Mem, Piece};
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::Arc;

/// Not a test of its own: a rank in a process of its own, for the other tests. Prints what connect and three syncs gave.
#[test]
fn child() {
    let Ok(spec) = std::env::var("RESHARD_CUDA_CHILD") else { return };
    let [rank, gpu, name] = spec.splitn(3, ',').collect::<Vec<_>>().try_into().expect("rank,gpu,name");
    let r: usize = rank.parse().expect("a rank");
    let kind = (RS_DEVICE_CUDA, gpu.parse().expect("a GPU"));
    let case = two_ranks();
    let mut memory = Memory::new(kind, &case.ranks[r].blocks, 7);
    let own = standin::<usize>(c"standin_live").map(|_| counted(c"standin_live"));
    let comm = Comm::local(name, r, 2, 0, TIMEOUT_MS).unwrap();
    let tables = Tables::new(&case, &case.ranks[r], kind, |b| memory.address(case.ranks[r].buffers[b].block, 0));
    let mut container = Container::create(&case.ranks[r], &tables, &comm, TIMEOUT_MS).unwrap();
    container.stream = memory.stream();
    let fails = std::env::var("RESHARD_CUDA_FAIL").ok();
    if let Some((name, n)) = fails.as_ref().and_then(|f| f.split_once(',')) {
        fail_in(&std::ffi::CString::new(name).unwrap(), n.parse().expect("which call"));
    }
    let said = (|| -> Result<(), Failure> {
        if std::env::var("RESHARD_CUDA_RENEW").is_ok() {
            container.connect()?;
            container.sync(90, None)?;
            // The owner's first. The reader's own may be others at any time.
            memory.renew();
            let e = container.sync(91, None).expect_err("the source is not the one that is open");
            let (status, text) = [(RS_ERR_STATE, "was replaced by another allocation"), (RS_ERR_MISMATCH, "rank 0 refused")][r];
            assert!(e.status == status && e.text.contains(text), "{e}");
            if r == 0 {
                container.rebind(&tables)?;
            }
            container.sync(92, None)?;
        }
        // Again, as after a rebind: what was open is closed.
        for round in 0..2 {
            container.connect()?;
            for version in 3 * round + 1..3 * round + 4 {
                let mut image = memory.bytes();
                write(&case, r, RS_SOURCE, &[true; 2], version, &memory, &mut image);
                memory.write(&image);
                write(&case, r, RS_TARGET, &[true; 2], version, &memory, &mut image);
                container.sync(version, None)?;
                compare(&case, r, &memory, &image).unwrap();
            }
        }
        Ok(())
    })();
    println!("@{said:?}");
    drop(container);
    drop(comm);
    if fails.is_some() {
        fail_in(c"", 0);
    }
    // Nothing is open any more, of the driver's or the other process's.
    assert!(own.is_none_or(|own| own == counted(c"standin_live")), "something is left");
    // The owner's memory goes when its reader has closed it: when this rank's parent, who has heard from both, says so.
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

/// Two ranks, in a process each.
struct Pair {
    gpus: [i32; 2],
    settings: Vec<(&'static str, &'static str)>,
    /// The rank of which the n-th call of a function fails.
    fails: Option<(usize, &'static str, u64)>,
}

impl Pair {
    fn of(settings: &[(&'static str, &'static str)]) -> Pair {
        Pair { gpus: [0, 0], settings: settings.to_vec(), fails: None }
    }

    fn start(&self, rank: usize, name: &str) -> Child {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["sharing::child", "--exact", "--nocapture"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.env("RESHARD_CUDA_CHILD", format!("{rank},{},{name}", self.gpus[rank]));
        command.envs(self.settings.iter().copied());
        if let Some((_, name, n)) = self.fails.filter(|f| f.0 == rank) {
            command.env("RESHARD_CUDA_FAIL", format!("{name},{n}"));
        }
        command.spawn().unwrap()
    }

    /// What each rank says; all of them end well.
    fn run(&self) -> [String; 2] {
        static RUNS: AtomicU64 = AtomicU64::new(0);
        let name = format!("cuda {} {}", std::process::id(), RUNS.fetch_add(1, Ordering::Relaxed));
        let mut children = [0, 1].map(|rank| self.start(rank, &name));
        // The reader ends first.
        let mut said = [1, 0].map(|rank: usize| {
            let child = &mut children[rank];
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            let said = lines.find_map(|l| l.unwrap().split_once('@').map(|l| l.1.to_string())).expect("it says how it went");
            drop(child.stdin.take());
            // Whatever else it prints.
            lines.for_each(drop);
            assert!(child.wait().unwrap().success(), "rank {rank}, which said: {said}");
            said
        });
        said.reverse();
        said
    }

    fn moves(&self) {
        assert_eq!(self.run(), ["Ok(())", "Ok(())"]);
    }

    /// Both ranks are refused, and told why and what to do.
    fn refused(&self, words: &[&str]) {
        for said in self.run() {
            let always = ["status: -", "rs_comm_from_nccl()"];
            always.iter().chain(words).for_each(|w| assert!(said.contains(w), "'{w}' is not in: {said}"));
        }
    }
}

/// Small pieces, so that a block lies in several.
const MAPPED: [(&str, &str); 2] = [("RESHARD_GPU_MEMORY", "mapped"), ("STANDIN_GRANULARITY", "4096")];

/// Whether the driver can say of which allocation mapped memory is; the old stand-in cannot.
fn mappings() -> bool {
    standin::<usize>(c"cuMemRetainAllocationHandle").is_some()
}

#[test]
fn processes_share_a_gpu() {
    let Some(_alone) = alone() else { return };
    Pair::of(&[]).moves();
    if mappings() {
        Pair::of(&MAPPED).moves();
        Pair::of(&MAPPED[..1]).moves();
    } else {
        Pair::of(&MAPPED).refused(&["driver is too old"]);
    }
}

/// A trainer that unmaps its weights and maps others at the same addresses, as one that offloads.
#[test]
fn what_is_open_elsewhere_is_not_replaced_unseen() {
    let Some(_alone) = alone() else { return };
    if mappings() {
        Pair::of(&[MAPPED[0], MAPPED[1], ("RESHARD_CUDA_RENEW", "1"), ("STANDIN_UNMAPPED", "ok")]).moves();
    }
}

#[test]
fn processes_share_memory_of_a_peer() {
    let Some(_alone) = alone() else { return };
    let mut can = 0;
    if second().is_some() {
        // SAFETY: writes its one result.
        assert_eq!(unsafe { sys::cuDeviceCanAccessPeer(&mut can, 1, 0) } as u32, 0);
    }
    if can == 0 {
        return;
    }
    Pair { gpus: [0, 1], ..Pair::of(&[]) }.moves();
    if mappings() {
        Pair { gpus: [0, 1], ..Pair::of(&MAPPED) }.moves();
    }
}

#[test]
fn memory_that_others_cannot_open_is_refused() {
    let Some(_alone) = alone() else { return };
    if !mappings() {
        return;
    }
    let private = ["RESHARD_GPU_MEMORY", "private"].into();
    Pair::of(&[private]).refused(&[
        "requestedHandleTypes is 0x0",
        "POSIX_FILE_DESCRIPTOR",
        "expandable segments",
        "memory of cuda:0",
    ]);
    Pair::of(&[("RESHARD_GPU_MEMORY", "pool")]).refused(&["stream-ordered pool", "cudaMalloc()"]);
    if standin::<usize>(c"standin_calls").is_some() {
        // A driver that says otherwise what a mapping is.
        let whole = [MAPPED[0], MAPPED[1], ("STANDIN_WHOLE_MAPPINGS", "1")];
        Pair::of(&whole).refused(&["does not tell the allocations apart"]);
    }
}

/// Whichever call fails while memory is shared and given back: it is named where it fails, the other rank is told, nothing is left on
/// either side.
#[test]
fn every_call_of_sharing_may_fail() {
    let Some(_alone) = alone() else { return };
    if standin::<usize>(c"standin_calls").is_none() || !mappings() {
        return;
    }
    let owner = ["cuPointerGetAttributes", "cuMemRetainAllocationHandle", "cuMemExportToShareableHandle", "cuMemRelease"];
    let reader = [
        "cuMemAddressReserve",
        "cuMemImportFromShareableHandle",
        "cuMemMap",
        "cuMemRelease",
        "cuMemSetAccess",
        "cuMemUnmap",
        "cuMemAddressFree",
    ];
    // What gives something back has done it by the time that it fails.
    let gives_back = ["cuMemRelease", "cuMemUnmap", "cuMemAddressFree"];
    for (rank, names) in [(0, &owner[..]), (1, &reader[..])] {
        for &name in names {
            for n in 1..4 {
                println!("rank {rank}: {name}, call {n}");
                let said = Pair { fails: Some((rank, name, n)), ..Pair::of(&MAPPED) }.run();
                if gives_back.contains(&name) {
                    assert_eq!(said, ["Ok(())", "Ok(())"], "{name}, call {n}");
                } else if n == 1 || said[rank] != "Ok(())" {
                    assert!(said[rank].contains(&format!("{name} answered CUDA_ERROR_UNKNOWN (999)")), "{}", said[rank]);
                    assert!(said[1 - rank].contains("status: -"), "{name}, call {n}: {}", said[1 - rank]);
                }
            }
        }
    }
}

/// Nothing that another process sends is believed: descriptors of something else, lengths beyond what there is, blocks outside.
#[test]
fn what_others_export_is_checked() {
    let Some(_alone) = alone() else { return };
    if !mappings() {
        return;
    }
    if gpu::origin() == gpu::Origin::Whole {
        let test = ["sharing::what_others_export_is_checked", "--exact", "--nocapture"];
        let mut again = Command::new(std::env::current_exe().unwrap());
        assert!(again.args(test).envs(MAPPED).status().unwrap().success());
        return;
    }
    let bytes: Vec<u8> = (0..40_000u32).map(|i| model::mix(i.into()) as u8).collect();
    let block = Block::new(GPU_0, &bytes);
    block.read();
    let live = standin::<usize>(c"standin_live").map(|_| counted(c"standin_live"));
    {
        let device = CudaDevice::new(0).unwrap();
        // SAFETY: parts of a live block.
        let part = |from: usize, len| unsafe { Mem::of(GPU_0, block.at(from), len) };
        let mut exports = reshard::device::export(&[&[part(100, 20_000), part(20_100, 19_000)]]);
        let exports: Vec<Export> = exports.remove(0).blocks.into_iter().flatten().collect();
        let [one, two] = &exports[..] else { panic!("both can be opened") };
        let (Allocation::Pieces(run), Allocation::Pieces(same)) = (&one.of, &two.of) else { panic!("by descriptors") };
        assert!(Arc::ptr_eq(run, same), "one piece is in both");
        assert!(run.len() > 1);
        // Two blocks are one import; each has its bytes.
        let (first, second) = (device.import(one).unwrap(), device.import(two).unwrap());
        assert_eq!(second.0.addr() - first.0.addr(), 20_000);
        assert!(Arc::ptr_eq(&first.1, &second.1));
        for (mem, from) in [(first.0, 100), (second.0, 20_100)] {
            let mut got = vec![0; mem.len()];
            // SAFETY: so many bytes of what is open.
            unsafe { gpu::read(mem.addr() as *const u8, &mut got) };
            assert_eq!(got, &bytes[from..from + mem.len()]);
        }
        let total: u64 = run.iter().map(|piece| piece.1).sum();
        let refused = |of: Vec<Piece>, offset, len, words: &str| {
            let e = device.import(&Export { of: Allocation::Pieces(of.into()), offset, len }).map(|_| ()).unwrap_err();
            assert!(e.text().contains(words), "'{words}' is not in: {e}");
        };
        refused(run.to_vec(), total - 10, 11, "of another process");
        refused(run.to_vec(), u64::MAX, 11, "of another process");
        let other: Arc<std::os::fd::OwnedFd> = Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        refused(vec![run[0].clone(), (other, 4096)], 0, 1, "cuMemImportFromShareableHandle");
        let longer = |piece: &Piece| (piece.0.clone(), 2 * piece.1);
        refused(vec![longer(&run[0]), run[1].clone()], 0, 1, "cuMemMap");
        refused(vec![(run[0].0.clone(), 1000)], 0, 1, "cuMemAddressReserve");
        refused(vec![], 0, 0, "cuMemAddressReserve");
        refused(vec![(run[0].0.clone(), 1 << 62); 4], 0, 1, "longer than an address space");
    }
    assert!(live.is_none_or(|live| live == counted(c"standin_live")), "something is left");
}
