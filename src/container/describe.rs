//! What a container tells about itself, as JSON. Keys are only ever added.
#![forbid(unsafe_code)]

use super::connect::Connected;
use super::{Container, Phase, lock};
use crate::abi::*;
use crate::error::{Result, bail};
use crate::exec::work::Bytes;
use crate::plan::{Piece, report};
use serde_json::{Value, json};

impl Container {
    /// `what` is one of `RS_DESCRIBE_*`; `param` narrows the plan to one parameter.
    pub fn describe(&self, what: u32, param: Option<&str>) -> Result<String> {
        let value = match (what, param) {
            (RS_DESCRIBE_PLAN, None) => self.describe_plan(self.connected()?)?,
            (RS_DESCRIBE_PLAN, Some(name)) => self.describe_param(self.connected()?, name)?,
            (RS_DESCRIBE_STATS, None) => self.describe_stats(),
            (RS_DESCRIBE_LAYOUT, None) => self.describe_layout(),
            (RS_DESCRIBE_STATS | RS_DESCRIBE_LAYOUT, Some(_)) => bail!(RS_ERR_INVALID, "param goes with RS_DESCRIBE_PLAN only"),
            _ => bail!(
                RS_ERR_INVALID,
                "what is {what}; a container tells RS_DESCRIBE_PLAN, RS_DESCRIBE_STATS and RS_DESCRIBE_LAYOUT"
            ),
        };
        Ok(value.to_string())
    }

    fn connected(&self) -> Result<&Connected> {
        match &self.phase {
            Phase::Connected(c) => Ok(c),
            _ => bail!(RS_ERR_STATE, "there is no plan before rs_container_connect()"),
        }
    }

    fn describe_plan(&self, c: &Connected) -> Result<Value> {
        let comm = self.comm()?;
        let peers = report::peers(&c.planned.plan, c.message);
        let rounds = |key: &str| peers.iter().filter_map(|p| p[key].as_u64()).max().unwrap_or(0);
        let moves: usize = c.planned.plan.peers.iter().map(|p| p.out.len() + p.into.len()).sum();
        let mut out = json!({
            "rank": comm.rank(),
            "world": comm.world(),
            "comm": comm.name(),
            "message_bytes": c.message,
            "rounds": rounds("messages_out").max(rounds("messages_in")),
            "staging_bytes": self.staging_of(c),
            "plan_seconds": lock(&self.stats).plan_seconds,
            "bytes": bytes(&c.work().bytes),
            "peers": peers,
            "moves": moves + c.planned.plan.doubles.len() + self.local.pieces.len(),
        });
        if let Some(world) = &c.planned.world {
            out["found"] = world.found();
        }
        Ok(out)
    }

    /// `boxes`: who sends each box of the target of that name. `sent`: who gets each box of a source.
    fn describe_param(&self, c: &Connected, name: &str) -> Result<Value> {
        let me = self.comm()?.rank();
        let rows: Vec<u32> = (0..).zip(self.layout.buffers()).filter(|(_, b)| b.name == name).map(|(i, _)| i).collect();
        if rows.is_empty() {
            bail!(RS_ERR_NOT_FOUND, "no parameter '{name}' on this rank");
        }
        let own = |row: u32| self.layout.buffers()[row as usize].name.as_str();
        let (mut boxes, mut sent) = (vec![], vec![]);
        let add = |list: &mut Vec<Value>,
                   p: &Piece,
                   (tensor, shape): (&str, &[u64]),
                   key: &str,
                   rank: u32,
                   param: Option<&str>,
                   via: &str| {
            let mut v = report::piece(p, tensor, shape);
            v[key] = json!(rank);
            if let Some(param) = param {
                v["param_from"] = json!(param);
            }
            v["via"] = json!(via);
            list.push(v);
        };
        let union = |p: &Piece| {
            let t = &c.planned.union.tensors[p.tensor as usize];
            (t.name.as_str(), &t.shape[..])
        };
        let local = |p: &Piece| {
            let t = &self.layout.tensors()[p.tensor as usize];
            (t.name.as_str(), &t.shape[..])
        };
        for (list, via) in [(&self.local.pieces, "local"), (&self.local.aliased, "aliased")] {
            for p in list.iter().filter(|p| rows.contains(&p.dst.buffer)) {
                add(&mut boxes, p, local(p), "from", me, Some(own(p.src.buffer)), via);
            }
        }
        for p in c.planned.plan.doubles.iter().filter(|p| rows.contains(&p.dst.buffer)) {
            add(&mut boxes, p, union(p), "from", me, Some(own(p.src.buffer)), "double");
        }
        for peer in &c.planned.plan.peers {
            for p in peer.into.iter().filter(|p| rows.contains(&p.dst.buffer)) {
                let known = || c.planned.names.get(&(peer.rank, p.src.buffer)).cloned();
                let from =
                    c.planned.world.as_ref().map_or_else(known, |w| w.param_name(usize::from(relayed(p)), peer.rank, p.src.buffer));
                add(&mut boxes, p, union(p), "from", peer.rank, from.as_deref(), if relayed(p) { "relay" } else { "wire" });
            }
            for p in peer.out.iter().filter(|p| rows.contains(&p.src.buffer)) {
                add(&mut sent, p, union(p), "to", peer.rank, None, "wire");
            }
        }
        Ok(json!({"param": name, "boxes": boxes, "sent": sent}))
    }

    fn describe_stats(&self) -> Value {
        let (s, params) = (lock(&self.stats), lock(&self.params));
        let phase = match &self.phase {
            _ if lock(&self.broken).is_some() => "failed",
            Phase::Created => "created",
            Phase::Connected(_) if s.syncs > 0 => "synced",
            Phase::Connected(_) => "connected",
            Phase::Failed(_) => "failed",
        };
        let count = |state| params.iter().filter(|p| p.state == state).count();
        let mut totals = bytes(&s.bytes);
        totals["landed"] = json!(s.bytes.local + s.bytes.aliased + s.bytes.doubled + s.bytes.received);
        json!({
            "state": phase,
            "failure": s.failure,
            "version": s.version,
            "syncs": s.syncs,
            "seconds": s.seconds,
            "connect_seconds": s.connect_seconds,
            "plan_seconds": s.plan_seconds,
            "plans": s.plans,
            "staging_bytes": s.staging_bytes,
            "rounds": s.rounds,
            "bytes": totals,
            "params": {
                "initial": count(RS_PARAM_INITIAL),
                "synced": count(RS_PARAM_SYNCED),
                "landed": count(RS_PARAM_LANDED),
                "torn": count(RS_PARAM_TORN),
            },
        })
    }

    fn describe_layout(&self) -> Value {
        let tensors: Vec<Value> = self.layout.tensors().iter().map(|t| json!({"name": t.name, "shape": t.shape})).collect();
        let buffers: Vec<Value> = self
            .layout
            .buffers()
            .iter()
            .map(|b| {
                json!({
                    "name": b.name,
                    "bytes": b.bytes,
                    "role": b.role,
                    "padded": b.padded,
                    "dtype": {"code": b.dtype.code, "bits": b.dtype.bits, "lanes": b.dtype.lanes},
                    "shape": b.shape,
                    "strides": b.strides,
                })
            })
            .collect();
        let tiles: Vec<Value> = self
            .layout
            .tiles()
            .iter()
            .map(|t| {
                let shape = &self.layout.tensors()[t.tensor as usize].shape;
                json!({"tensor": t.tensor, "buffer": t.buffer, "offset": t.pattern.val, "box": crate::plan::shown(&t.pattern, shape)})
            })
            .collect();
        json!({"tensors": tensors, "buffers": buffers, "tiles": tiles})
    }

    fn staging_of(&self, c: &Connected) -> u64 {
        let group = c.work().group.as_ref().map_or(0, |g| g.staging());
        let pipe = self.comm.as_ref().and_then(|c| c.pipe().map(|p| p.bytes()));
        group + pipe.unwrap_or(0)
    }
}

fn relayed(piece: &Piece) -> bool {
    piece.stream.is_some_and(|s| s.hop > 0)
}

fn bytes(b: &Bytes) -> Value {
    json!({"local": b.local, "aliased": b.aliased, "doubled": b.doubled, "sent": b.sent, "packed": b.packed, "received": b.received})
}
