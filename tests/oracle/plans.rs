//! Checks what the library says about its plan against counts made element by element.

use super::library::Container;
use super::model::{Case, item};
use super::truth::{held, lower_bound};
use reshard::abi::{RS_CONFIG_RELAY, RS_SOURCE, RS_TARGET};
use serde_json::Value;
use std::collections::HashMap;

/// The longest message of a plan.
pub fn message_bytes(container: &Container) -> u64 {
    number(&container.plan(None).expect("connected"), "message_bytes")
}

/// What a rank's plan says that it receives from some ranks.
pub fn received(container: &Container, from: impl Fn(usize) -> bool) -> u64 {
    let plan = container.plan(None).expect("connected");
    let wanted = |p: &&Value| from(number(p, "rank") as usize);
    list(&plan, "peers").iter().filter(wanted).map(|p| number(p, "received")).sum()
}

fn number(json: &Value, key: &str) -> u64 {
    json[key].as_u64().unwrap_or_else(|| panic!("no number {key} in {json}"))
}

fn list<'a>(json: &'a Value, key: &str) -> &'a Vec<Value> {
    json[key].as_array().unwrap_or_else(|| panic!("no list {key} in {json}"))
}

/// Every rank's plan, and with `boxes` who sends each box of each target.
pub fn check(case: &Case, containers: &[Container], boxes: bool) -> Result<(), String> {
    let all = vec![true; case.tensors.len()];
    let plans: Vec<Value> = containers.iter().map(|c| c.plan(None).expect("connected")).collect();
    let mut pairs: HashMap<(usize, usize), [(u64, u64); 2]> = HashMap::new();
    for (r, plan) in plans.iter().enumerate() {
        let fail = |text: String| Err(format!("rank {r}: {text}; its plan: {plan}"));
        if number(plan, "rank") != r as u64 || number(plan, "world") != case.ranks.len() as u64 {
            return fail("another rank's plan".into());
        }
        if plan["message_bytes"] != plans[0]["message_bytes"] {
            return fail(format!("message_bytes differ from rank 0's {}", plans[0]["message_bytes"]));
        }
        let [local, aliased, doubled, sent, received] =
            ["local", "aliased", "doubled", "sent", "received"].map(|key| number(&plan["bytes"], key));
        let targets: u64 = case.ranks[r].tiles_of(RS_TARGET).map(|t| bytes_of(case, t)).sum();
        if received != lower_bound(case, r, &all) {
            return fail(format!("receives {received} bytes where it lacks {}", lower_bound(case, r, &all)));
        }
        if aliased != shared_bytes(case, r) {
            return fail(format!("{aliased} bytes aliased, {} are", shared_bytes(case, r)));
        }
        // Doubles are read from targets, all else from sources.
        let (doubles, at_source) = doubled_bytes(case, r);
        if doubled != doubles || local + aliased + at_source + received != targets {
            return fail(format!(
                "{local} + {aliased} + {doubled} + {received} bytes for targets of {targets}, {doubles} of them doubles"
            ));
        }
        let mut longest = 0;
        for peer in list(plan, "peers") {
            let p = number(peer, "rank") as usize;
            let [out, into] =
                [("sent", "messages_out"), ("received", "messages_in")].map(|(b, m)| (number(peer, b), number(peer, m)));
            pairs.entry((r, p)).or_default()[0] = out;
            pairs.entry((p, r)).or_default()[1] = into;
            longest = longest.max(out.1).max(into.1);
            if out.0 > out.1 * number(plan, "message_bytes") || (out.0 == 0) != (out.1 == 0) {
                return fail(format!("{out:?} bytes and messages to rank {p} do not fit"));
            }
        }
        if sent != list(plan, "peers").iter().map(|p| number(p, "sent")).sum::<u64>() || number(plan, "rounds") < longest {
            return fail("its sums are not those of its peers".into());
        }
        if boxes {
            check_boxes(case, r, containers)?;
        }
    }
    match pairs.into_iter().find(|(_, [out, into])| out != into) {
        Some(((from, to), [out, into])) => {
            Err(format!("rank {from} sends {out:?} bytes and messages to {to}, which expects {into:?}"))
        }
        None => Ok(()),
    }
}

fn bytes_of(case: &Case, tile: &super::model::Tile) -> u64 {
    tile.extent.iter().product::<i64>() as u64 * case.tensors[tile.tensor].item() as u64
}

/// Bytes of the second and further targets of elements that come from other ranks, as targets have them and as sources do.
fn doubled_bytes(case: &Case, rank: usize) -> (u64, u64) {
    let (have, want) = (held(case, rank, RS_SOURCE), held(case, rank, RS_TARGET));
    let mut sums = (0, 0);
    for (t, tensor) in case.tensors.iter().enumerate() {
        let more = |(w, h): (&u32, &u32)| if *h == 0 { u64::from(w.saturating_sub(1)) } else { 0 };
        let count: u64 = want[t].iter().zip(&have[t]).map(more).sum();
        sums = (sums.0 + count * item(tensor.target) as u64, sums.1 + count * tensor.item() as u64);
    }
    sums
}

/// Bytes of a rank's targets that are their own source: the same element at the same address.
fn shared_bytes(case: &Case, rank: usize) -> u64 {
    let owner = &case.ranks[rank];
    let places = |role: u32| {
        owner.tiles_of(role).flat_map(move |tile| {
            let (buffer, item) = (&owner.buffers[tile.buffer], item(owner.buffers[tile.buffer].dtype));
            tile.elements(item).into_iter().map(move |(e, byte)| ((buffer.block, buffer.at + byte), (tile.tensor, e)))
        })
    };
    let mut sources: HashMap<(usize, usize), Vec<(usize, usize)>> = HashMap::new();
    places(RS_SOURCE).for_each(|(place, element)| sources.entry(place).or_default().push(element));
    let shared = places(RS_TARGET).filter(|(place, element)| sources.get(place).is_some_and(|s| s.contains(element)));
    shared.map(|(_, (t, _))| case.tensors[t].item() as u64).sum()
}

/// Each element of each target has one sender, which holds it: this rank if it can, else one of the same GPU, else one of the same host
/// if one can, else a rank that passes on what it gets, or any source. A second tile of an element that came from afar is filled from the
/// first.
fn check_boxes(case: &Case, rank: usize, containers: &[Container]) -> Result<(), String> {
    let container = &containers[rank];
    let sources: Vec<Vec<Vec<u32>>> = (0..case.ranks.len()).map(|r| held(case, r, RS_SOURCE)).collect();
    let targets: Vec<Vec<Vec<u32>>> = (0..case.ranks.len()).map(|r| held(case, r, RS_TARGET)).collect();
    let host = |r: usize| case.ranks[r].host;
    let mut came: HashMap<(usize, usize), u32> = HashMap::new();
    for (b, buffer) in case.ranks[rank].buffers.iter().enumerate().filter(|(_, b)| b.role & RS_TARGET != 0) {
        let json = container.plan(Some(&buffer.name)).map_err(|e| format!("rank {rank}: {}: {e}", buffer.name))?;
        let fail = |text: String| Err(format!("rank {rank}: {}: {text}; its boxes: {json}", buffer.name));
        let mut left: HashMap<(usize, usize), i64> = HashMap::new();
        let (mut bytes, mut hidden) = (0, false);
        for tile in case.ranks[rank].tiles.iter().filter(|t| t.buffer == b) {
            bytes += bytes_of(case, tile);
            tile.elements(1).iter().for_each(|&(e, _)| *left.entry((tile.tensor, e)).or_default() += 1);
        }
        for entry in list(&json, "boxes").iter().filter(|entry| entry.get("from").is_some()) {
            let Some(t) = case.tensors.iter().position(|t| t.name == entry["tensor"]) else {
                return fail("an unknown tensor".into());
            };
            let (from, size, double) = (number(entry, "from") as usize, number(entry, "bytes"), entry["via"] == "double");
            let relay = entry["via"] == "relay";
            let role = if double || relay { RS_TARGET } else { RS_SOURCE };
            let named = |o: &super::model::Buffer| o.role & role != 0 && o.name == entry["param_from"];
            let tensor = &case.tensors[t];
            let item = if double { item(tensor.target) } else { tensor.item() } as u64;
            let at_source = size / item * tensor.item() as u64;
            if from >= case.ranks.len()
                || !case.ranks[from].buffers.iter().any(named)
                || at_source > bytes
                || double && from != rank
            {
                return fail(format!("rank {from}'s {} cannot send {size} bytes", entry["param_from"]));
            }
            bytes -= at_source;
            if entry["box"].is_object() {
                hidden = true;
                if number(&entry["box"], "elements") * item != size {
                    return fail(format!("{entry} is of another size"));
                }
                continue;
            }
            let elements = box_elements(&case.tensors[t].shape, &entry["box"]);
            if elements.len() as u64 * item != size {
                return fail(format!("{entry} is of another size"));
            }
            for e in elements {
                *left.entry((t, e)).or_default() -= 1;
                let has = |r: usize| sources[r][t][e] > 0;
                let gpu = |r: usize| containers[r].gpu.filter(|_| containers[r].gpu == containers[rank].gpu);
                let near = |r: usize| match gpu(r) {
                    _ if r == rank => 0,
                    Some(_) => 1,
                    None => 2 + u32::from(host(r) != host(rank)),
                };
                let nearest = (0..case.ranks.len()).filter(|&r| has(r)).map(near).min();
                let lands = |r: usize| case.ranks[r].flags & RS_CONFIG_RELAY != 0 && targets[r][t][e] > 0;
                if relay && (!lands(from) || from == rank || nearest != Some(3)) {
                    return fail(format!("element {e} of {} is passed on by rank {from}", entry["tensor"]));
                }
                if !double && !relay && (!has(from) || nearest != Some(near(from))) {
                    return fail(format!("element {e} of {} comes from rank {from}", entry["tensor"]));
                }
                let times = came.entry((t, e)).or_default();
                *times += u32::from(!double && !has(rank));
                if *times > 1 || double && has(rank) {
                    return fail(format!("element {e} of {} comes {times} times", entry["tensor"]));
                }
            }
        }
        if bytes != 0 || !hidden && left.values().any(|&n| n != 0) {
            return fail("its boxes are not its tiles".into());
        }
    }
    Ok(())
}

/// Row-major indices of a box given as [[low, high], ...].
fn box_elements(shape: &[i64], json: &Value) -> Vec<usize> {
    let mut all = vec![0];
    for (axis, bounds) in json.as_array().unwrap_or_else(|| panic!("a box: {json}")).iter().enumerate() {
        let (low, high) = (bounds[0].as_i64().expect("a bound"), bounds[1].as_i64().expect("a bound"));
        all = all.iter().flat_map(|&i| (low..high).map(move |x| i * shape[axis] as usize + x as usize)).collect();
    }
    all
}
