//! How evenly plans use the ranks: egress among replicas, rounds without idle ranks.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Boxes smaller than this times the number of their replicas are not cut among them.
const CUT: u64 = 256 * 1024;

/// Replicas of a box that serve the same targets in one tier.
struct Class {
    senders: Vec<usize>,
    served: Vec<usize>,
    bytes: u64,
    small: u64,
    egress: BTreeMap<usize, u64>,
}

/// What each rank sends, by class.
pub struct Egress {
    hosts: Vec<u64>,
    classes: Vec<Class>,
    known: HashMap<(Vec<usize>, Vec<usize>), usize>,
}

/// Bytes of all classes, and of those that are asserted; their busiest rank, over the mean; the same of each of the others, in words
/// too.
pub struct Judgement {
    pub all: u64,
    pub asserted: u64,
    pub busiest: f64,
    pub classes: usize,
    pub others: Vec<(f64, String)>,
}

impl Egress {
    /// `hosts` are those of all ranks.
    pub fn new(hosts: Vec<u64>) -> Egress {
        Egress { hosts, classes: Vec::new(), known: HashMap::new() }
    }

    /// The class of a box for each rank that wants it: the holders of its host serve it, if there are any, else all.
    pub fn classes(&mut self, holders: &BTreeSet<usize>, wanting: &BTreeSet<usize>) -> BTreeMap<usize, usize> {
        let mut served: BTreeMap<Vec<usize>, Vec<usize>> = BTreeMap::new();
        let mut senders: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        for &target in wanting {
            let host = self.hosts[target];
            let senders = match senders.entry(host) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    let near: Vec<usize> = holders.iter().copied().filter(|h| self.hosts[*h] == host).collect();
                    new.insert(if near.is_empty() { holders.iter().copied().collect() } else { near })
                }
            };
            served.entry(senders.clone()).or_default().push(target);
        }
        let mut out = BTreeMap::new();
        for key in served {
            let class = *self.known.entry(key.clone()).or_insert(self.classes.len());
            out.extend(key.1.iter().map(|&target| (target, class)));
            if class == self.classes.len() {
                let (senders, served) = key;
                self.classes.push(Class { senders, served, bytes: 0, small: 0, egress: BTreeMap::new() });
            }
        }
        out
    }

    /// One rank of a class wants a box of so many bytes.
    pub fn wanted(&mut self, class: usize, bytes: u64) {
        let class = &mut self.classes[class];
        class.bytes += bytes;
        class.small += if bytes < class.senders.len() as u64 * CUT { bytes } else { 0 };
    }

    /// One rank sends so many bytes of it.
    pub fn sent(&mut self, class: usize, from: usize, bytes: u64) {
        *self.classes[class].egress.entry(from).or_default() += bytes;
    }

    /// Within each class every replica sends the same, within a twentieth.
    pub fn judge(&self) -> Result<Judgement, String> {
        let mut out = Judgement { all: 0, asserted: 0, busiest: 0.0, classes: self.classes.len(), others: Vec::new() };
        for class in &self.classes {
            let (who, all) = (format!("{:?} to {:?}", class.senders, class.served), class.egress.values().sum::<u64>());
            if all != class.bytes {
                return Err(format!("{who}: {all} bytes are sent, {} are wanted", class.bytes));
            }
            if !class.egress.keys().all(|s| class.senders.contains(s)) {
                return Err(format!("{who}: {:?} send what others have nearer", class.egress));
            }
            let mean = class.bytes as f64 / class.senders.len() as f64;
            let ratio = class.egress.values().copied().max().unwrap_or(0) as f64 / mean;
            out.all += class.bytes;
            if class.senders.len() <= 16 && class.small * 100 < class.bytes {
                out.asserted += class.bytes;
                out.busiest = out.busiest.max(ratio);
                if ratio > 1.05 {
                    return Err(format!("{who}: the busiest sends {ratio:.3} of the mean, {mean} bytes"));
                }
            } else {
                let text = format!("egress of {who}: {ratio:.3} of the mean, {} bytes, {} small", class.bytes, class.small);
                out.others.push((ratio, text));
            }
        }
        Ok(out)
    }
}

/// What a rank sends another: `messages` of `size` bytes, but for the last.
pub struct Transfer {
    pub from: usize,
    pub to: usize,
    pub bytes: u64,
    pub messages: u64,
    pub size: u64,
}

/// The rounds of all ranks together.
pub struct Rounds {
    pub count: usize,
    /// Their time over that of the busiest rank alone.
    pub figure: f64,
    /// Whether the sending ranks have as many peers and bytes as each other, within a tenth.
    pub alike: bool,
    /// Of each sending rank: receivers, and bytes.
    pub senders: BTreeMap<usize, (u64, u64)>,
}

impl Rounds {
    /// Of `ranks` ranks.
    pub fn new(ranks: usize, transfers: &[Transfer]) -> Rounds {
        let (mut rounds, mut totals): (Vec<Vec<[u64; 2]>>, Vec<[u64; 2]>) = (Vec::new(), vec![[0; 2]; ranks]);
        let mut senders: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
        for transfer in transfers.iter().filter(|t| t.bytes > 0) {
            let mut left = transfer.bytes;
            for k in 1..=transfer.messages as usize {
                let bytes = if k == transfer.messages as usize { left } else { transfer.size.min(left) };
                left -= bytes;
                if rounds.len() < k {
                    rounds.push(vec![[0; 2]; ranks]);
                }
                for (at, way) in [(transfer.from, 0), (transfer.to, 1)] {
                    rounds[k - 1][at][way] += bytes;
                    totals[at][way] += bytes;
                }
            }
            let sender = senders.entry(transfer.from).or_default();
            *sender = (sender.0 + 1, sender.1 + transfer.bytes);
        }
        let busiest = |round: &Vec<[u64; 2]>| round.iter().map(|r| r[0].max(r[1])).max().unwrap_or(0);
        let figure = rounds.iter().map(busiest).sum::<u64>() as f64 / busiest(&totals).max(1) as f64;
        let even = |of: fn(&(u64, u64)) -> u64| {
            let (least, most) = (senders.values().map(of).min(), senders.values().map(of).max());
            most.unwrap_or(0) as f64 <= 1.1 * least.unwrap_or(0) as f64
        };
        let alike = !senders.is_empty() && even(|s| s.0) && even(|s| s.1);
        Rounds { count: rounds.len(), figure, alike, senders }
    }

    /// All ranks together are not much slower than the busiest alone, where the sending ranks are alike.
    pub fn judge(&self) -> Result<(), String> {
        match self.alike && self.figure > 1.25 {
            true => Err(format!("the rounds take {} times the busiest rank's own time; senders {:?}", self.figure, self.senders)),
            false => Ok(()),
        }
    }
}
