//! What rs_fingerprint() must say, by the formula in the header: digit by digit, from the elements' values alone.

use super::model::{Case, item};
use reshard::abi::{RS_SOURCE, RS_TARGET, rs_dtype_t};
use xxhash_rust::xxh3::xxh3_128;

const P: u128 = (1 << 127) - 1;
const R: u128 = 0x243f_6a88_85a3_08d3_1319_8a2e_0370_7344;

fn times(a: u128, b: u128) -> u128 {
    let mut out = 0;
    for bit in (0..127).rev() {
        out = 2 * out % P;
        if b >> bit & 1 == 1 {
            out = (out + a) % P;
        }
    }
    out
}

/// Of a tensor of which `count` elements are there; the bytes of others are zeros.
pub fn of_tensor(name: &str, dtype: rs_dtype_t, shape: &[i64], bytes: &[u8], count: u128) -> u128 {
    let mut sum = 0;
    for word in bytes.chunks(8).rev() {
        let mut padded = [0; 8];
        padded[..word.len()].copy_from_slice(word);
        sum = times((sum + u128::from(u64::from_le_bytes(padded))) % P, R);
    }
    let mut label = [name.as_bytes(), &[0, dtype.code, dtype.bits]].concat();
    shape.iter().for_each(|n| label.extend(n.to_le_bytes()));
    times((sum + count) % P, xxh3_128(&label) % P)
}

/// Of what all ranks hold as `role` when all sources are at `version` and the targets too: of the tensors for which `named` says so, or
/// of all that a sync moves. `None`: of nothing.
pub fn fingerprint(case: &Case, role: u32, version: u64, named: Option<&dyn Fn(&str) -> bool>) -> Option<u128> {
    let any_target = case.ranks.iter().flat_map(|r| &r.buffers).any(|b| b.role & RS_TARGET != 0);
    let (mut sum, mut held) = (0, false);
    for (t, tensor) in case.tensors.iter().enumerate() {
        let elements = |role| {
            let tiles = case.ranks.iter().flat_map(move |r| r.tiles_of(role)).filter(|tile| tile.tensor == t);
            let mut here = vec![false; tensor.len()];
            tiles.flat_map(|tile| tile.elements(1)).for_each(|(e, _)| here[e] = true);
            here
        };
        let wanted = elements(RS_TARGET).contains(&true);
        if !named.map_or(wanted || !any_target, |named| named(&tensor.name)) {
            continue;
        }
        let (here, as_role) = (elements(role), if wanted { RS_TARGET } else { RS_SOURCE });
        let dtype = tensor.dtype_as(as_role);
        let mut bytes = vec![0; tensor.len() * item(dtype)];
        for (e, place) in bytes.chunks_mut(item(dtype)).enumerate().filter(|(e, _)| here[*e]) {
            tensor.value(e, version, as_role, place);
        }
        let count = here.iter().filter(|&&h| h).count();
        held |= count > 0;
        sum = (sum + if count > 0 { of_tensor(&tensor.name, dtype, &tensor.shape, &bytes, count as u128) } else { 0 }) % P;
    }
    held.then_some(sum)
}
