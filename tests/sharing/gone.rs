//! Memory that is gone, or another, when a sync wants it.

use super::*;
use crate::oracle::model::{Buffer, Tile};
use crate::oracle::small::many_rounds;

/// Memory that its owner gave back between two syncs: an error on every rank, before anything moves.
#[test]
fn memory_that_is_gone_is_refused() {
    let Some(_alone) = alone() else { return };
    for gone in [0, 1] {
        let mut world = World::connected(two_ranks(), &[GPU_0, GPU_0]);
        world.sync(1);
        let rank = &world.case.ranks[gone];
        let mut other = Memory::new(GPU_0, &rank.blocks, 8);
        let tables = Tables::new(&world.case, rank, GPU_0, |b| other.address(rank.buffers[b].block, rank.buffers[b].at));
        world.containers[gone].stream = other.stream();
        world.memories[gone] = other;
        refused(&mut world, gone, "was freed or unmapped since it was bound");
        // Connect too, where others would open it.
        for answer in world.all(|c| c.connect()) {
            match gone {
                0 => says(answer, RS_ERR_STATE, &["was freed or unmapped since it was bound"]),
                _ => answer.unwrap(),
            }
        }
        world.containers[gone].rebind(&tables).unwrap();
        world.all(|c| c.connect()).into_iter().for_each(|result| result.unwrap());
        world.sync(3);
    }
}

/// Other memory at the same address, as of an engine that slept and woke, is as good where nobody else has the former open.
#[test]
fn memory_that_is_mapped_may_be_renewed() {
    let Some(_alone) = alone() else { return };
    if gpu::origin() != gpu::Origin::Mapped {
        let test = ["sharing::gone::memory_that_is_mapped_may_be_renewed", "--exact"];
        let program = std::env::current_exe().unwrap();
        for reserved in ["STANDIN_UNSET", "STANDIN_RESERVED"] {
            let mut again = Command::new(&program);
            again.args(test).env("RESHARD_GPU_MEMORY", "mapped").env(reserved, "1");
            assert!(again.status().unwrap().success());
        }
        return;
    }
    let mut world = World::connected(two_ranks(), &[GPU_0, GPU_0]);
    for version in 1..4 {
        world.sync(version);
        world.memories.iter_mut().for_each(Memory::renew);
    }
    for asleep in [0, 1] {
        let bytes = world.memories[asleep].sleep();
        let answers = world.all(|c| c.sync(9, None));
        says(answers.into_iter().nth(asleep).expect("a rank"), RS_ERR_STATE, &["was freed or unmapped since it was bound"]);
        world.memories[asleep].wake(&bytes);
        world.sync(10);
    }
}

/// Where the memory of a parameter is gone that a sync does not use, the sync does not care.
#[test]
fn memory_that_is_not_used_may_be_gone() {
    let Some(_alone) = alone() else { return };
    let case = two_ranks();
    let comms = [0, 1].map(|rank| Comm::loopback(4997, rank, 2).unwrap());
    let mut memory: Vec<Vec<Block>> = vec![];
    let mut containers: Vec<Container> = vec![];
    for (rank, comm) in case.ranks.iter().zip(&comms) {
        let blocks: Vec<Block> = rank.blocks.iter().map(|&bytes| Block::new(GPU_0, &vec![7; bytes])).collect();
        let tables = Tables::new(&case, rank, GPU_0, |b| blocks[rank.buffers[b].block].at(0));
        let mut container = Container::create(rank, &tables, comm, TIMEOUT_MS).unwrap();
        container.stream = blocks[0].stream();
        blocks.iter().for_each(|block| drop(block.read()));
        memory.push(blocks);
        containers.push(container);
    }
    let all = |containers: &mut [Container], call: &(dyn Fn(&mut Container) -> Result<(), Failure> + Sync)| {
        std::thread::scope(|scope| {
            let threads: Vec<_> = containers.iter_mut().map(|c| scope.spawn(|| call(c))).collect();
            threads.into_iter().map(|t| t.join().expect("no panic")).collect::<Vec<_>>()
        })
    };
    all(&mut containers, &|c| c.connect()).into_iter().for_each(|r| r.unwrap());
    // Of 'b', the source of tensor B.
    drop(memory[0].pop());
    all(&mut containers, &|c| c.sync(1, Some(&["A".to_string()]))).into_iter().for_each(|r| r.unwrap());
    let answers = all(&mut containers, &|c| c.sync(2, Some(&["B".to_string()])));
    says(answers.into_iter().next().expect("rank 0's"), RS_ERR_STATE, &["the memory of 'b'"]);
}

/// A target that was its source's own memory, which nothing copied, is looked at once it is not.
#[test]
fn memory_that_a_rebind_brings_into_use_is_looked_at() {
    let Some(_alone) = alone() else { return };
    let mut case = many_rounds();
    let mut rank = case.ranks.remove(1);
    rank.buffers.push(Buffer { name: "source".into(), role: RS_SOURCE, ..rank.buffers[0].clone() });
    rank.tiles.push(Tile { buffer: 1, ..rank.tiles[0].clone() });
    case.ranks = vec![rank];
    let rank = &case.ranks[0];
    let [one, other] = [1, 2].map(|fill| Block::new(GPU_0, &vec![fill; rank.blocks[0]]));
    [&one, &other].into_iter().for_each(|block| drop(block.read()));
    let comm = Comm::loopback(4998, 0, 1).unwrap();
    let tables = |target: &Block| Tables::new(&case, rank, GPU_0, |row| if row == 0 { target.at(0) } else { one.at(0) });
    let mut container = Container::create(rank, &tables(&one), &comm, TIMEOUT_MS).unwrap();
    container.stream = one.stream();
    container.connect().unwrap();
    container.sync(1, None).unwrap();
    container.rebind(&tables(&other)).unwrap();
    drop(other);
    says(container.sync(2, None), RS_ERR_STATE, &["the memory of 'a'", "was freed or unmapped since it was bound"]);
}

/// What cudaMalloc gave at the address of what was freed is not taken for that.
#[test]
fn memory_that_is_another_is_refused() {
    let Some(_alone) = alone() else { return };
    if standin::<usize>(c"standin_calls").is_none() || gpu::origin() != gpu::Origin::Whole {
        return;
    }
    if std::env::var("STANDIN_REUSE").is_err() {
        let test = ["sharing::gone::memory_that_is_another_is_refused", "--exact"];
        let program = std::env::current_exe().unwrap();
        assert!(Command::new(program).args(test).env("STANDIN_REUSE", "1").status().unwrap().success());
        return;
    }
    for gone in [0, 1] {
        let mut world = World::connected(two_ranks(), &[GPU_0, GPU_0]);
        world.sync(1);
        let blocks = world.case.ranks[gone].blocks.clone();
        let before = world.memories[gone].address(0, 0);
        world.memories[gone] = Memory::new(HOST, &blocks, 7);
        world.memories[gone] = Memory::new(GPU_0, &blocks, 7);
        assert_eq!(world.memories[gone].address(0, 0), before);
        world.containers[gone].stream = world.memories[gone].stream();
        refused(&mut world, gone, "was replaced by another allocation since it was bound");
    }
}

/// A sync of a world whose rank `gone` does not have the memory any more that it had.
fn refused(world: &mut World, gone: usize, why: &str) {
    let expected: Vec<Vec<u8>> = world.memories.iter().map(Memory::bytes).collect();
    for (rank, answer) in world.all(|c| c.sync(9, None)).into_iter().enumerate() {
        match rank == gone {
            true => says(answer, RS_ERR_STATE, &["the memory of '", why, "rs_container_rebind()"]),
            false => says(answer, RS_ERR_MISMATCH, &[&format!("rank {gone} refused"), "nothing moved"]),
        }
    }
    world.compare(&expected);
}
