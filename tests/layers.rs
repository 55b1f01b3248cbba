//! The rules of the source tree that no compiler checks:
//! - a module uses only modules above it in `src/lib.rs`,
//! - `unsafe` stays in the files that may have it, each block under a `// SAFETY:` comment,
//! - no model's, framework's or parameter's name in code outside `src/preset/`,
//! - files that one can read in one sitting.
//!
//! Each rule is a function from a file's text to what is wrong with it; the second half of the file shows every rule a text that
//! breaks it.

mod lexer;

use lexer::{Kind, Token, is_path_separator, tokens, without_test_items};
use std::fs;
use std::path::{Path, PathBuf};

/// Most lines of a file that people write.
const LONGEST: usize = 600;

/// Names that only `src/preset/` may know, as parts of identifiers and strings.
const NAMES: &[&str] = &[
    "llama",
    "qwen",
    "deepseek",
    "mistral",
    "mixtral",
    "gemma",
    "kimi",
    "smollm",
    "megatron",
    "vllm",
    "sglang",
    "huggingface",
    "tensor_parallel",
    "pipeline_parallel",
    "expert_parallel",
    "tensor_model_parallel",
    "pipeline_model_parallel",
    "eplb",
    "qkv",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_up",
    "gate_proj",
    "up_proj",
    "down_proj",
    "linear_fc",
    "self_attn",
    "lm_head",
    "embed_tokens",
    "layernorm",
    "kv_head",
    "vocab",
];

/// Modules of the crate that hold files with `unsafe`; all others forbid it.
const UNSAFE_MODULES: &[&str] = &["ffi", "device", "comm"];

fn may_be_unsafe(path: &str) -> bool {
    let device = ["mem", "host", "cuda", "foreign"].map(|stem| format!("device/{stem}"));
    path.starts_with("ffi/") || device.iter().any(|d| path.starts_with(d)) || (path.starts_with("comm/") && path != "comm/mod.rs")
}

/// The modules of the crate in the order of `src/lib.rs`, the lowest layer first.
fn layers(lib: &str) -> Vec<String> {
    let code = code(lib);
    let names = code.windows(3).filter(|w| w[0].is("mod") && w[2].is(";"));
    names.map(|w| w[1].text.clone()).collect()
}

fn code(text: &str) -> Vec<Token> {
    tokens(text).into_iter().filter(|t| t.kind != Kind::Comment).collect()
}

/// `comm/local.rs` is module `["comm", "local"]`, `comm/mod.rs` is `["comm"]`.
fn module_of(path: &str) -> Vec<&str> {
    let mut parts: Vec<&str> = path.trim_end_matches(".rs").split('/').collect();
    if parts.last() == Some(&"mod") {
        parts.pop();
    }
    parts
}

/// The names that follow a path's start: one, or those of a `{...}` group.
fn heads(code: &[Token], at: usize) -> Vec<&Token> {
    if !code[at].is("{") {
        return vec![&code[at]];
    }
    let (mut depth, mut found) = (0, Vec::new());
    for (i, token) in code.iter().enumerate().skip(at) {
        match token.text.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            _ if depth == 1 && (code[i - 1].is("{") || code[i - 1].is(",")) => found.push(token),
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    found
}

/// Uses of modules that do not stand above this file's.
fn upward_uses(path: &str, text: &str, layers: &[String]) -> Vec<String> {
    let code = code(text);
    let own = module_of(path);
    let place = |name: &str| layers.iter().position(|l| l == name);
    let Some(mine) = place(own[0]) else { return vec![format!("{path}: module {} is not in src/lib.rs", own[0])] };
    let mut wrong = Vec::new();
    // Braces of the inline modules that enclose a token: `super` counts them.
    let (mut inline, mut depth): (Vec<usize>, usize) = (Vec::new(), 0);
    let mut i = 0;
    while i < code.len() {
        match code[i].text.as_str() {
            "{" => {
                depth += 1;
                if i >= 2 && code[i - 2].is("mod") {
                    inline.push(depth);
                }
            }
            "}" => {
                if inline.last() == Some(&depth) {
                    inline.pop();
                }
                depth -= 1;
            }
            start @ ("crate" | "super") if is_path_separator(&code, i + 1) => {
                let mut supers = usize::from(start == "super");
                let mut at = i + 3;
                while code[at].is("super") && is_path_separator(&code, at + 1) {
                    supers += 1;
                    at += 3;
                }
                if start == "crate" || supers == own.len() + inline.len() {
                    for used in heads(&code, at) {
                        let line = used.line;
                        match place(&used.text) {
                            Some(theirs) if theirs <= mine => {}
                            Some(_) => wrong
                                .push(format!("{path}:{line}: {} uses {}, which stands below it in src/lib.rs", own[0], used.text)),
                            None => wrong.push(format!("{path}:{line}: crate::{} is not a module of src/lib.rs", used.text)),
                        }
                    }
                }
                i = at;
                continue;
            }
            _ => {}
        }
        i += 1;
    }
    wrong
}

/// `unsafe` in a file that may not have it. The type of a C function's pointer (`unsafe extern "C" fn(`) is no unsafe code.
fn misplaced_unsafe(path: &str, text: &str) -> Vec<String> {
    let code = code(text);
    let is_pointer_type = |i: usize| {
        code.get(i + 3).is_some_and(|t| code[i + 1].is("extern") && code[i + 2].kind == Kind::Text && t.is("fn"))
            && code.get(i + 4).is_some_and(|t| t.is("("))
    };
    let bad = (0..code.len()).filter(|&i| code[i].is("unsafe") && !may_be_unsafe(path) && !is_pointer_type(i));
    bad.map(|i| format!("{path}:{}: unsafe code in a file that may not have it", code[i].line)).collect()
}

/// A top module that neither forbids `unsafe` nor, where some of its files may have it, denies it in general.
fn missing_lint(path: &str, text: &str) -> Vec<String> {
    let own = module_of(path);
    if own.len() != 1 || own[0] == "ffi" {
        return Vec::new();
    }
    let lint = if UNSAFE_MODULES.contains(&own[0]) { "deny" } else { "forbid" };
    let has = code(text).windows(7).any(|w| w.iter().map(|t| t.text.as_str()).eq(["#", "!", "[", lint, "(", "unsafe_code", ")"]));
    if has { Vec::new() } else { vec![format!("{path}: wants #![{lint}(unsafe_code)]")] }
}

/// Unsafe blocks and impls without a `SAFETY:` comment in or before their statement, or right above their line.
fn missing_safety(path: &str, text: &str) -> Vec<String> {
    let all = tokens(text);
    let mut wrong = Vec::new();
    for (i, token) in all.iter().enumerate() {
        let next = all[i + 1..].iter().find(|t| t.kind != Kind::Comment);
        if !token.is("unsafe") || !next.is_some_and(|t| t.is("{") || t.is("impl")) {
            continue;
        }
        let statement = all[..i].iter().rev().take_while(|t| t.kind != Kind::Punct || ![";", "{", "}"].contains(&t.text.as_str()));
        let comment_at = |line: usize| all.iter().filter(move |t| t.kind == Kind::Comment && t.line == line);
        let above = (1..token.line).rev().map_while(|line| comment_at(line).next());
        if !statement.chain(above).any(|t| t.kind == Kind::Comment && t.text.contains("SAFETY:")) {
            wrong.push(format!("{path}:{}: unsafe without a SAFETY comment", token.line));
        }
    }
    wrong
}

/// Names that only presets may know, in code (tests and comments may name them).
fn foreign_names(path: &str, text: &str) -> Vec<String> {
    let stem = path.rsplit('/').next();
    if path.starts_with("preset/") || stem == Some("tests.rs") || path.contains("/tests/") {
        return Vec::new();
    }
    let mut wrong = Vec::new();
    for token in without_test_items(code(text)) {
        let lower = token.text.to_lowercase();
        for name in NAMES.iter().filter(|n| lower.contains(**n)) {
            wrong.push(format!("{path}:{}: '{name}' in {:?}: only src/preset/ may know it", token.line, token.text));
        }
    }
    wrong
}

fn too_long(path: &str, text: &str) -> Vec<String> {
    let lines = text.lines().count();
    if lines > LONGEST { vec![format!("{path}: {lines} lines, at most {LONGEST}")] } else { Vec::new() }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Files below `folder` with one of these endings, with their paths relative to it.
fn files(folder: &Path, endings: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next).unwrap_or_else(|e| panic!("{}: {e}", next.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| endings.contains(&e.to_str().unwrap())) {
                found.push((path.strip_prefix(folder).unwrap().to_str().unwrap().to_string(), fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

fn none(wrong: Vec<String>) {
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn the_library_keeps_its_rules() {
    let lib = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let layers = layers(&lib);
    let files = files(&root().join("src"), &["rs"]);
    for module in &layers {
        assert!(files.iter().any(|(path, _)| module_of(path) == [module.as_str()]), "src/lib.rs names {module}, which has no file");
    }
    let mut wrong = Vec::new();
    for (path, text) in files.iter().filter(|(path, _)| path != "lib.rs") {
        wrong.extend(upward_uses(path, text, &layers));
        wrong.extend(missing_lint(path, text));
        wrong.extend(misplaced_unsafe(path, text));
        wrong.extend(missing_safety(path, text));
        wrong.extend(foreign_names(path, text));
    }
    none(wrong);
}

#[test]
fn every_file_is_short() {
    let mut wrong = Vec::new();
    for folder in ["src", "tests", "benches", "cpp_examples", "include"].into_iter().filter(|f| root().join(f).is_dir()) {
        for (path, text) in files(&root().join(folder), &["rs", "c", "cpp", "hpp", "h", "py", "sh"]) {
            // The C header is generated from files that are short.
            if (folder, path.as_str()) != ("include", "reshard.h") {
                wrong.extend(too_long(&format!("{folder}/{path}"), &text));
            }
        }
    }
    none(wrong);
}

fn order() -> Vec<String> {
    layers("pub mod geom;\n/// mod ghost;\npub mod plan;\npub mod comm;\nmod exec;\n")
}

#[test]
fn layers_come_from_the_map() {
    assert_eq!(order(), ["geom", "plan", "comm", "exec"]);
}

#[test]
fn a_use_of_a_higher_layer_is_found() {
    let uses = |path: &str, text: &str| upward_uses(path, text, &order());
    for (path, text) in [
        ("plan/mod.rs", "use crate::exec::run;"),
        ("plan/mod.rs", "use crate::{geom::Box, exec::{self, run}};"),
        ("plan/mod.rs", "fn f() -> super::comm::Rank { 0 }"),
        ("plan/mod.rs", "fn f() { crate::comm::abort() }"),
        ("plan/mod.rs", "macro_rules! m { () => { $crate::exec::run() } }"),
        ("plan/route.rs", "use super::super::exec;"),
        ("plan/route.rs", "mod inner { use super::super::super::exec; }"),
        ("geom/mod.rs", "mod tests { use crate::plan; }"),
        ("exec.rs", "use crate::nowhere::Thing;"),
        ("stray.rs", "fn f() {}"),
    ] {
        assert_eq!(uses(path, text).len(), 1, "{path}: {text}");
    }
    for (path, text) in [
        ("exec.rs", "use crate::{comm::{Comm, exec}, geom, plan::Plan}; use crate::exec::run;"),
        ("exec.rs", "// crate::nowhere::Thing\nfn f() { \"crate::nowhere\"; 'c'; r#\"crate::\"nowhere\"#; }"),
        ("plan/route.rs", "use super::exec; mod tests { use super::super::exec; }"),
        ("plan/mod.rs", "pub(crate) fn f<'a>(x: &'a str) {} mod a { mod b { use super::super::exec; } } use self::comm::x;"),
    ] {
        none(uses(path, text));
    }
}

#[test]
fn unsafe_outside_its_files_is_found() {
    let found = |path: &str, text: &str| misplaced_unsafe(path, text).len();
    for text in [
        "unsafe { f() }",
        "unsafe fn f() {}",
        "unsafe impl Send for T {}",
        "#[unsafe(no_mangle)] fn f() {}",
        "unsafe extern \"C\" { fn f(); }",
    ] {
        assert_eq!(found("plan/mod.rs", text), 1, "{text}");
        assert_eq!(found("comm/mod.rs", text), 1, "{text}");
        for path in ["comm/local/ring.rs", "device/host.rs", "device/host/nt.rs", "device/mem.rs", "device/cuda.rs", "ffi/api.rs"] {
            assert_eq!(found(path, text), 0, "{path}: {text}");
        }
    }
    assert_eq!(found("device/mod.rs", "unsafe { f() }"), 1);
    assert_eq!(found("abi.rs", "type f = Option<unsafe extern \"C\" fn(x: i32)>; // unsafe { }\n"), 0);
    assert_eq!(found("abi.rs", "unsafe extern \"C\" fn named(x: i32) {}"), 1);
}

#[test]
fn a_module_without_its_lint_is_found() {
    assert_eq!(missing_lint("plan/mod.rs", "//! #![forbid(unsafe_code)]\n").len(), 1);
    assert_eq!(missing_lint("plan/mod.rs", "#![deny(unsafe_code)]").len(), 1);
    assert_eq!(missing_lint("comm/mod.rs", "#![allow(unsafe_code)]").len(), 1);
    none(missing_lint("plan/mod.rs", "//! Doc.\n#![forbid(unsafe_code)]"));
    none(missing_lint("comm/mod.rs", "#![deny(unsafe_code)]"));
    none(missing_lint("plan/route.rs", ""));
}

#[test]
fn unsafe_without_a_reason_is_found() {
    for text in [
        "fn f() { unsafe { g() } }",
        "// Safe enough.\nunsafe impl Send for T {}",
        "// SAFETY: of another statement\nlet a = 1;\nlet b = unsafe { g() };",
        "// SAFETY: the first\nunsafe impl Send for T {}\nunsafe impl Sync for T {}",
        "let s = \"SAFETY:\"; unsafe { g() }",
    ] {
        assert_eq!(missing_safety("ffi/mod.rs", text).len(), 1, "{text}");
    }
    none(missing_safety("ffi/mod.rs", "fn f() {\n    // SAFETY: g wants nothing.\n    let x = h(1,\n        unsafe { g() });\n}"));
    none(missing_safety(
        "ffi/mod.rs",
        "fn f() {\n    // SAFETY: g wants nothing,\n    // ever.\n    if a { b } else { unsafe { g() } }\n}",
    ));
    none(missing_safety("ffi/mod.rs", "pub unsafe fn f() {} /* SAFETY: whole */ unsafe impl Send for T {}"));
}

#[test]
fn a_name_of_a_model_is_found() {
    for text in ["fn load_llama() {}", "const N: &str = \"linear_qkv\";", "struct VllmRank;", "match b\"Qwen3\" { _ => {} }"] {
        assert_eq!(foreign_names("plan/mod.rs", text).len(), 1, "{text}");
    }
    none(foreign_names("preset/vllm.rs", "struct Vllm;"));
    none(foreign_names("plan/mod.rs", "// Megatron's fused qkv\nfn f() {}\n/* vllm */"));
    none(foreign_names("plan/mod.rs", "#[cfg(test)]\nmod tests { fn qkv() { if true { } } }"));
    none(foreign_names("plan/tests.rs", "fn qkv() {}"));
    assert_eq!(foreign_names("plan/mod.rs", "#[cfg(test)]\nuse a::qkv;\nfn llama() {}").len(), 1);
}

#[test]
fn a_long_file_is_found() {
    assert_eq!(too_long("plan/mod.rs", &"x\n".repeat(LONGEST + 1)).len(), 1);
    none(too_long("plan/mod.rs", &"x\n".repeat(LONGEST)));
}
