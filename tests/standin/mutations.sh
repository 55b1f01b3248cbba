#!/usr/bin/env bash
# Proof that the tests over the stand-in driver see what they are for: each line below takes one thing out of the library that GPUs need,
# in a copy of the sources, and the tests must fail. Needs cargo, g++.
#
#   tests/standin/mutations.sh [WORD ...]     all, or those whose name holds one of the words
set -euo pipefail
cd "$(dirname "$0")/../.."

export RESHARD_MEMORY=cuda RESHARD_CASES=${RESHARD_CASES:-60} STANDIN_SEED=${STANDIN_SEED:-3}
words=("$@")
copy=target/mutations/tree
red=0
green=()

tests/standin/build.sh
mkdir -p "$copy"

# tested DRIVER TEST ...: these tests of the copy over that driver; fails if one does.
tested() {
    local driver=$1 tests=()
    shift
    for test in "$@"; do tests+=(--test "$test"); done
    LD_LIBRARY_PATH=$PWD/target/$driver CARGO_TARGET_DIR=$PWD/target/mutations/target \
        cargo test --quiet --locked --manifest-path "$copy/Cargo.toml" "${tests[@]}"
}

fresh() {
    tar -c Cargo.toml Cargo.lock build.rs src include tests benches | tar -x -m -C "$copy" # new times: cargo must see what is put back
}

chosen() {
    local word
    [ ${#words[@]} -gt 0 ] || return 0
    for word in "${words[@]}"; do [[ $1 == *"$word"* ]] && return 0; done
    return 1
}

# mutation NAME FILE OLD NEW [DRIVER TEST ...]: the text OLD, which the file has once, becomes NEW. The tests are cuda and properties, if
# it does not say others.
mutation() {
    local name=$1 file=$2 with=("${@:5}")
    [ ${#with[@]} -gt 0 ] || with=(standin cuda properties)
    chosen "$name" || return 0
    fresh
    python3 - "$copy/$file" "$3" "$4" <<'PY'
import sys
path, old, new = sys.argv[1:]
text = open(path).read()
if text.count(old) != 1:
    sys.exit(f"{path} has {text.count(old)} times: {old}")
open(path, "w").write(text.replace(old, new))
PY
    if tested "${with[@]}" >"target/mutations/$name.log" 2>&1; then
        green+=("$name")
        printf '%-22s NOT SEEN\n' "$name"
    elif grep -q 'error: could not compile' "target/mutations/$name.log"; then
        green+=("$name")
        printf '%-22s DOES NOT COMPILE\n' "$name"
    else
        red=$((red + 1))
        printf '%-22s seen: %s\n' "$name" "$(grep -m 1 -oE 'standin: [A-Z-]+|something is left|bytes differ|context is current|is called' "target/mutations/$name.log" || echo "a test failed")"
    fi
}

fresh
{ tested standin cuda properties streams nccl && tested standin-old cuda properties; } >target/mutations/unchanged.log 2>&1 || { echo "the tests fail without any mutation: target/mutations/unchanged.log"; exit 1; }

gpu=src/device/cuda/gpu.rs
mutation context-restored $gpu '(self.gpu.api.cuCtxPopCurrent_v2)(&mut popped);' 'let _: &mut CUcontext = &mut popped;'
mutation captures-spared $gpu 'CU_STREAM_CAPTURE_MODE_RELAXED' 'CU_STREAM_CAPTURE_MODE_GLOBAL'
mutation context-released $gpu 'unsafe { (self.api.cuDevicePrimaryCtxRelease_v2)(self.handle) };' 'let _ = self.handle;'
mutation pool-destroyed $gpu 'pool.destroy();' ''
mutation pool-opened $gpu 'gpu.open_to(&other);' '' standin nccl
mutation pools-opened $gpu 'other.open_to(&gpu);' '' standin nccl
held=src/device/cuda/held.rs
mutation memory-gone $held 'if gone || !same {' 'if !same {' standin cuda
mutation memory-another $held '(gone, now.named && now.id == id)' '(gone, true)' standin cuda
mutation pieces-another $held 'gone || !now.named && current.mapping(place.at)?.id == id' 'true' standin cuda
mutation pieces-unseen $held '(gone || mapped && !now.mapped, true)' '(gone, true)' standin cuda
mutation lists-freed src/device/cuda/lists.rs 'self.gpu.free(self.at);' ''
mutation event-destroyed src/device/cuda/mod.rs 'self.gpu.destroy(event.0);' 'let _ = event;'
mutation stream-destroyed $gpu '(self.api.cuStreamDestroy_v2)(self.stream);' ''
mutation module-unloaded $gpu '                    (self.api.cuModuleUnload)(self.module);' ''
mutation upload-waited $gpu 'self.api.done("cuMemcpyHtoDAsync", copied)?;
            self.api.done("cuStreamSynchronize", (self.api.cuStreamSynchronize)(self.stream))' 'self.api.done("cuMemcpyHtoDAsync", copied)'
mutation memory-waited src/device/cuda/pool.rs 'let waited = self.api.done("cuStreamSynchronize", (self.api.cuStreamSynchronize)(self.stream));' 'let waited: Result<()> = Ok(());'
mutation peers-enabled src/device/cuda/gpu.rs 'if found.ordinal == id => self.enable_peer(id),' 'if found.ordinal == id => Ok(()),'
mutation sources-waited src/container/sync.rs 'let ready = ready.and_then(|_| settle(&*self.device, request.stream, comm, deadline));' 'let ready = ready.map(|_| drop(settle));' standin-old cuda properties
mutation reads-waited src/exec/mod.rs 'batches.units.start(self.stream).and_then(|()| self.settle())' 'batches.units.start(self.stream)' standin-old cuda properties
mutation packs-waited src/exec/group.rs 'self.pack(run, round)?;
            run.settle()?;' 'self.pack(run, round)?;'
mutation peers-asked $gpu '&& !found.named && !found.managed' '&& false'
mutation import-closed src/device/cuda/ipc.rs 'unsafe { (self.gpu.api.cuIpcCloseMemHandle)(self.base) };' ''
mutation offset-added src/device/cuda/ipc.rs '(base + export.offset) as usize' 'base as usize'
mutation stream-checked $gpu 'if context != self.context {' 'if false {'
mutation memory-checked src/container/mod.rs 'device.reach(*mem).map_err(|e| e.context(format_args!("buffer '"'{}'"'", buffer.name)))?;' ''

pieces=src/device/cuda/pieces.rs
mutation pieces-unmapped $pieces 'unsafe { (calls.cuMemUnmap)(at, *len as usize) };' 'let _ = len;' standin cuda
mutation pieces-freed $pieces 'unsafe { (calls.cuMemAddressFree)(base, bytes as usize) };' 'let _ = bytes;' standin cuda
mutation pieces-accessible $pieces 'unsafe { (calls.cuMemSetAccess)(base, bytes as usize, &access, 1) })?;' '{ let _ = &access; 0 })?;' standin cuda
mutation pieces-in-line $pieces 'at += len;
    }
    // Reading alone' 'at += 0 * len;
    }
    // Reading alone' standin cuda

signs=src/exec/signs.rs
mutation ready-waited $signs 'self.owners.iter().try_for_each(|(_, page)| self.signals()?.wait(stream, page.mem(ready(self.me)), number))' 'Ok(())'
mutation readers-waited $signs 'self.readers.iter().try_for_each(|(_, page)| self.signals()?.wait(stream, page.mem(done(self.me)), number))' 'Ok(())' standin streams
mutation ready-behind-work src/container/sync.rs 's.ready(request.stream, c.number)' 's.ready(0, c.number)'
mutation reads-behind-word src/exec/mod.rs 'signs.leave(self.stream, number)?;' 'signs.left(number);' standin streams
mutation entered-said $signs 'self.mine.word(ENTERED).store(number, SeqCst);' '' standin cuda streams
mutation waits-released $signs 'self.owners.iter().filter(|(rank, _)| over(rank)).for_each(|(_, page)| grow(page.word(ready(self.me)), END));' '' standin streams
mutation page-unpinned src/device/cuda/own.rs 'unsafe { (self.gpu.api.cuMemHostUnregister)(ptr::with_exposed_provenance_mut(self.at)) };' 'let _ = self.at;'
mutation end-forgotten src/container/flight.rs '            self.device.forget(end);
        }
    }
}

/// A connection' '            let _ = end;
        }
    }
}

/// A connection' standin streams
mutation turn-given-back src/container/flight.rs 'later.taken().store(false, Ordering::Release);' 'let _ = later;'
mutation wreck-kept src/container/sync.rs 'self.wrecks.push(Wreck::new(tail, c))' 'drop((tail, c))' standin streams
mutation refused-kept src/container/sync.rs 'c.tail = Some(Stuck::on(&self.device, request.stream));' '' standin streams
mutation behind-others src/container/sync.rs 'filter(|left| !left.over()).try_for_each(|left| left.before(stream))' 'try_for_each(|_| { let _ = stream; Ok(()) })' standin streams
mutation graphs-kept src/container/sync.rs 'None if c.captured => self.graphs.push(*c),' '' standin streams
mutation graphs-refused src/container/sync.rs 'if capturing && !(c.streams && c.alone) {' 'if false {' standin streams
mutation host-pinned src/container/connect.rs 'kept.push(Arc::new((self.device.register(shared)?, mapping)));' 'drop((shared, mapping));' standin offload
mutation used-renewed src/container/sync.rs '(None, Some(_)) => &c.used,' '(None, _) => &c.used,' standin cuda
mutation scan-waited src/exec/scan.rs 'settle(self.device, stream, self.comm, self.deadline)' 'Ok::<(), Error>(())' standin properties
mutation fingerprints-counted src/container/fingerprint.rs 'c.number += 1;' '' standin properties

group=src/exec/group.rs
mutation relays-behind $group 'unpacked.before(pack)?;' '' standin properties
mutation rounds-forked $group 'streams.iter().try_for_each(|&s| order(device, run.stream, s))' 'streams.iter().try_for_each(|_| Ok(()))'
mutation rounds-joined $group 'let joined = streams.iter().map(|&s| order(device, s, run.stream)).fold(Ok(()), Result::and);' 'let joined: Result<()> = Ok(());'
mutation sends-behind-packs $group 'order(device, pack, wire)?;' ''
mutation packs-behind-sends $group 'sent.before(pack)?;' ''
mutation receives-behind-unpacks $group 'unpacked.before(wire)?;' ''
mutation unpacks-behind-receives $group 'sent.before(unpack)?;' ''
mutation group-on-stream $group 'self.on_stream(run)?;' ''
nccl=src/comm/nccl/mod.rs
mutation nccl-destroyed $nccl 'unsafe { (self.nccl.ncclCommDestroy)(state.comm) };' '' standin nccl
mutation nccl-borrowed $nccl 'if !self.owned {' 'if false {' standin nccl
mutation nccl-gather-freed $nccl 'self.gpu.free(gather.device);' 'let _ = gather.device;' standin nccl
mutation nccl-error-asked $nccl 'answer => self.nccl.done("an earlier call of NCCL", answer).map_err(|e| self.fail(e)).map(|()| true),' '_ => Ok(true),' standin streams

printf '\n%d seen, %d not\n' "$red" "${#green[@]}"
[ "${#green[@]}" -eq 0 ] && [ "$red" -gt 0 ]
