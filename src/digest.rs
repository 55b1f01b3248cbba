//! Sums that tell tensors apart and do not depend on how they are cut.
//!
//! A tensor's bytes, dense and row-major, are words of 8 in little endian, the last one filled up with zeros. Its *digest* is
//! `n + w[0] r + w[1] r^2 + ...` modulo the prime 2^127 - 1, `n` being the number of its elements: a polynomial in a fixed `r`. Every
//! byte adds its own term, so those who hold parts of a tensor add up what they hold; that a long run of bytes is summed word by word is
//! only faster. Two tensors of which something differs have the same digest with a probability of about 2^-127, unless somebody makes
//! them so: it is no signature.
//!
//! Knows bytes and where in a tensor they lie. Must not know memory, ranks or layouts.
#![forbid(unsafe_code)]

use once_cell::sync::Lazy;
use std::ops::{Add, AddAssign, Mul, Neg, Sub};
use xxhash_rust::xxh3::xxh3_128;

/// The prime.
const P: u128 = (1 << 127) - 1;

/// Of the fraction of pi.
const R: Residue = Residue::constant(0x243F_6A88_85A3_08D3_1319_8A2E_0370_7344);

/// Words that are summed before the sum is reduced.
const BLOCK: usize = 64;

/// A number modulo 2^127 - 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Residue(u128);

impl Residue {
    /// Of a number below 2^127 - 1.
    pub const fn constant(number: u128) -> Residue {
        assert!(number < P);
        Residue(number)
    }

    /// Of any number.
    pub fn new(number: u128) -> Residue {
        // 2^127 is 1.
        let folded = (number & P) + (number >> 127);
        Residue(if folded >= P { folded - P } else { folded })
    }

    /// 16 bytes, little endian.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }

    /// From what [`Residue::to_bytes`] gave.
    pub fn from_bytes(bytes: &[u8]) -> Residue {
        Residue::new(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u128::from(byte)))
    }
}

impl Add for Residue {
    type Output = Residue;
    fn add(self, other: Residue) -> Residue {
        // Both below 2^127: their sum fits.
        Residue::new(self.0 + other.0)
    }
}

impl AddAssign for Residue {
    fn add_assign(&mut self, other: Residue) {
        *self = *self + other;
    }
}

impl Neg for Residue {
    type Output = Residue;
    fn neg(self) -> Residue {
        Residue::new(P - self.0)
    }
}

impl Sub for Residue {
    type Output = Residue;
    fn sub(self, other: Residue) -> Residue {
        self + -other
    }
}

impl Mul for Residue {
    type Output = Residue;
    fn mul(self, other: Residue) -> Residue {
        let ([a0, a1], [b0, b1]) = (limbs(self.0), limbs(other.0));
        let (low, high) = (a0 * b0, a1 * b1);
        // The upper limbs have 63 bits: the sum fits.
        let middle = a0 * b1 + a1 * b0;
        let (low, carry) = low.overflowing_add(middle << 64);
        let high = high + (middle >> 64) + u128::from(carry);
        // high * 2^128, and 2^127 is 1.
        Residue::new(low) + Residue::new(high) + Residue::new(high)
    }
}

fn limbs(number: u128) -> [u128; 2] {
    [number & u128::from(u64::MAX), number >> 64]
}

/// A sum of products of two 64-bit numbers, not yet reduced.
#[derive(Default)]
struct Wide {
    sum: u128,
    carries: u64,
}

impl Wide {
    fn add(&mut self, a: u64, b: u64) {
        let (sum, carry) = self.sum.overflowing_add(u128::from(a) * u128::from(b));
        self.sum = sum;
        self.carries += u64::from(carry);
    }

    fn reduced(&self) -> Residue {
        // 2^128 is 2.
        Residue::new(self.sum) + Residue::new(2 * u128::from(self.carries))
    }
}

/// Powers of [`R`].
struct Powers {
    /// By exponent, in two halves: those of a block.
    block: [[u64; 2]; BLOCK],
    /// By byte of the exponent: `r^(value * 256^place)`.
    bytes: [[Residue; 256]; 8],
}

static POWERS: Lazy<Box<Powers>> = Lazy::new(|| {
    let mut out = Box::new(Powers { block: [[0; 2]; BLOCK], bytes: [[Residue(1); 256]; 8] });
    let mut step = R;
    for place in &mut out.bytes {
        for value in 1..256 {
            place[value] = place[value - 1] * step;
        }
        step = place[255] * step;
    }
    for exponent in 0..BLOCK {
        let power = out.bytes[0][exponent].0;
        out.block[exponent] = [power as u64, (power >> 64) as u64];
    }
    out
});

/// `r` to that power.
fn power(exponent: u64) -> Residue {
    let bytes = exponent.to_le_bytes();
    let factors = POWERS.bytes.iter().zip(bytes).filter(|(_, value)| *value != 0);
    factors.map(|(place, value)| place[usize::from(value)]).fold(Residue(1), Mul::mul)
}

/// What so many elements of a tensor add to its digest, whatever they hold.
pub fn elements(count: u64) -> Residue {
    Residue::new(count.into())
}

/// What a run of bytes adds that begins at byte `at` of its tensor.
pub fn run(bytes: &[u8], at: u64) -> Residue {
    let begin = (at % 8) as usize;
    let (head, rest) = bytes.split_at(if begin == 0 { 0 } else { bytes.len().min(8 - begin) });
    let mut sum = Residue::default();
    let mut next = power(at / 8 + 1);
    if !head.is_empty() {
        sum += Residue::new(word(head, begin).into()) * next;
        next = next * R;
    }
    let mut blocks = rest.chunks_exact(8 * BLOCK);
    let step = power(BLOCK as u64);
    for block in &mut blocks {
        sum += block_sum(block.chunks_exact(8).map(|w| word(w, 0))) * next;
        next = next * step;
    }
    let tail = blocks.remainder();
    if !tail.is_empty() {
        sum += block_sum(tail.chunks(8).map(|w| word(w, 0))) * next;
    }
    sum
}

fn block_sum(words: impl Iterator<Item = u64>) -> Residue {
    let (mut low, mut high) = (Wide::default(), Wide::default());
    for (word, [r0, r1]) in words.zip(&POWERS.block) {
        low.add(word, *r0);
        high.add(word, *r1);
    }
    low.reduced() + high.reduced() * Residue(1 << 64)
}

/// So many bytes from byte `begin` of a word on.
fn word(bytes: &[u8], begin: usize) -> u64 {
    match <[u8; 8]>::try_from(bytes) {
        Ok(all) => u64::from_le_bytes(all),
        Err(_) => bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte)) << (8 * begin),
    }
}

/// What the digest of a tensor is multiplied with before those of several are added up. `dtype` is DLPack's code and bits.
pub fn scale(name: &str, dtype: (u8, u8), shape: &[u64]) -> Residue {
    let mut text = name.as_bytes().to_vec();
    text.extend([0, dtype.0, dtype.1]);
    text.extend(shape.iter().flat_map(|n| n.to_le_bytes()));
    Residue::new(xxh3_128(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the school's method, bit by bit.
    fn product(a: u128, b: u128) -> u128 {
        (0..127).rev().fold(0, |sum, bit| {
            let double = (sum << 1) % P;
            if b >> bit & 1 == 1 { (double + a) % P } else { double }
        })
    }

    fn random(rng: &mut fastrand::Rng) -> u128 {
        match rng.u32(0..8) {
            0 => 0,
            1 => P - 1,
            2 => u128::from(u64::MAX),
            3 => P & !u128::from(u64::MAX),
            _ => rng.u128(0..P),
        }
    }

    #[test]
    fn the_arithmetic_is_that_of_the_field() {
        let mut rng = fastrand::Rng::with_seed(2);
        for _ in 0..3000 {
            let (a, b) = (random(&mut rng), random(&mut rng));
            let (x, y) = (Residue::new(a), Residue::new(b));
            assert_eq!((x * y).0, product(a, b), "{a} * {b}");
            assert_eq!((x + y).0, (a + b) % P);
            assert_eq!((x - y) + y, x);
            assert_eq!(Residue::from_bytes(&x.to_bytes()), x);
            let any = rng.u128(..);
            assert_eq!(Residue::new(any).0, any % P);
        }
        for number in [P, P + 1, u128::MAX, u128::MAX - 1] {
            assert_eq!(Residue::new(number).0, number % P);
        }
    }

    #[test]
    fn powers_are_repeated_products() {
        let mut sum = Residue(1);
        for exponent in 0..70_000 {
            assert_eq!(power(exponent), sum, "{exponent}");
            sum = sum * R;
        }
        let mut rng = fastrand::Rng::with_seed(4);
        for _ in 0..100 {
            let (a, b) = (rng.u64(..1 << 60), rng.u64(..1 << 60));
            assert_eq!(power(a) * power(b), power(a + b));
        }
    }

    /// Byte by byte, as the module says.
    fn naive(bytes: &[u8], at: u64) -> Residue {
        let mut sum = Residue(0);
        for (x, &byte) in (at..).zip(bytes) {
            let mut term = Residue::new(u128::from(byte) << (8 * (x % 8)));
            for _ in 0..x / 8 + 1 {
                term = term * R;
            }
            sum += term;
        }
        sum
    }

    #[test]
    fn a_run_is_the_sum_of_its_bytes_and_so_of_its_parts() {
        let mut rng = fastrand::Rng::with_seed(6);
        for round in 0..200 {
            let longest = if round % 10 == 0 { 3000 } else { 40 };
            let bytes: Vec<u8> = (0..rng.usize(0..longest)).map(|_| if round % 7 == 0 { 255 } else { rng.u8(..) }).collect();
            let at = rng.u64(0..600);
            let whole = run(&bytes, at);
            if round % 10 != 0 || round < 30 {
                assert_eq!(whole, naive(&bytes, at), "{} bytes at {at}", bytes.len());
            }
            let cut = rng.usize(..=bytes.len());
            assert_eq!(run(&bytes[..cut], at) + run(&bytes[cut..], at + cut as u64), whole);
        }
        // The largest sums that a block can have.
        let full = vec![255; 8 * BLOCK];
        assert_eq!(run(&full, 0), naive(&full, 0));
    }
}
