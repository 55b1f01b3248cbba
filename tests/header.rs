//! `include/reshard.h` is what cbindgen makes of `src/abi.rs` and `src/ffi/api*.rs`, and both headers compile alone, without a warning.
//!
//! `RESHARD_BLESS=1 cargo test --test header` writes the header anew.

use cbindgen::{Builder, Config, DocumentationLength, DocumentationStyle, Language, Layout, Style};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Conventions, constants and types in the order of `src/abi.rs`, functions in the order of `src/ffi/api.rs` and `api_comm.rs`.
fn generated() -> String {
    let mut config = Config {
        language: Language::C,
        style: Style::Both,
        no_includes: true,
        usize_is_size_t: true,
        line_length: 132,
        tab_width: 4,
        documentation_style: DocumentationStyle::Doxy,
        documentation_length: DocumentationLength::Full,
        ..Config::default()
    };
    config.function.args = Layout::Horizontal;
    let sources = ["src/abi.rs", "src/ffi/api.rs", "src/ffi/api_comm.rs"].map(|path| root().join(path));
    let builder = sources.iter().fold(Builder::new().with_config(config), Builder::with_src);
    let built = builder.generate().expect("cbindgen reads the sources");
    let mut text = vec![];
    built.write(&mut text);
    // Each type stands before its uses, so these need no tag.
    let text = String::from_utf8(text).expect("UTF-8").replace("struct rs_", "rs_").replace("typedef rs_", "typedef struct rs_");
    let text = one_line_comments(&text);

    let [abi, api, api_comm] = sources.map(|path| fs::read_to_string(path).unwrap());
    let api = api + &api_comm;
    let place = |item: &str| {
        let name = name_of(item);
        let at = |source: &str, word: &str, end: &str| source.find(&format!("{word} {name}{end}"));
        let in_abi = [("const", ":"), ("struct", " {"), ("struct", ";"), ("type", " =")].iter().find_map(|(w, e)| at(&abi, w, e));
        in_abi.or_else(|| Some(abi.len() + at(&api, "fn", "(")?)).unwrap_or_else(|| panic!("no {name} in the sources"))
    };
    let mut items: Vec<&str> = items(&text);
    items.sort_by_key(|item| place(item));
    let functions = items.partition_point(|item| place(item) < abi.len());
    [
        include_str!("header/head.h"),
        &items[..functions].join("\n\n"),
        "\n\n#ifdef __cplusplus\nextern \"C\" {\n#endif\n\n",
        &items[functions..].join("\n\n"),
        "\n\n#ifdef __cplusplus\n}\n#endif\n\n#endif /* RESHARD_H */\n",
    ]
    .concat()
}

/// Each constant, type and function with its comment: all have one.
fn items(text: &str) -> Vec<&str> {
    let mut starts: Vec<usize> = text.match_indices("\n/**").map(|(i, _)| i + 1).collect();
    starts.extend(text.starts_with("/**").then_some(0));
    starts.sort();
    let ends = starts.iter().skip(1).copied().chain([text.len()]);
    starts.iter().zip(ends).map(|(&start, end)| text[start..end].trim()).collect()
}

/// What an item declares.
fn name_of(item: &str) -> &str {
    let code = item.split_once("*/").expect("a comment").1.trim();
    let word = |text: &'static str| code.strip_prefix(text).map(|rest| rest.split([' ', ';']).next().unwrap());
    let pointer = || code.starts_with("typedef").then(|| code.split_once("(*")?.1.split(')').next()).flatten();
    let last = |end: char| code.split(end).next().unwrap().rsplit([' ', '*']).next();
    let alias = || code.starts_with("typedef").then(|| last(';')).flatten();
    word("#define ").or_else(|| word("typedef struct ")).or_else(pointer).or_else(alias).or_else(|| last('(')).expect("a name")
}

/// A comment of one line in one line.
fn one_line_comments(text: &str) -> String {
    let mut out: Vec<String> = vec![];
    for line in text.lines() {
        let n = out.len();
        let short = line.trim() == "*/" && n >= 2 && out[n - 2].trim() == "/**" && out[n - 1].trim_start().starts_with("* ");
        if short {
            let words = out.pop().unwrap();
            let start = out.pop().unwrap();
            out.push(format!("{start} {} */", words.trim_start().trim_start_matches("* ")));
        } else {
            out.push(line.to_string());
        }
    }
    out.join("\n")
}

#[test]
fn the_header_is_generated() {
    let path = root().join("include/reshard.h");
    let text = generated();
    if std::env::var_os("RESHARD_BLESS").is_some() {
        fs::write(&path, &text).unwrap();
    }
    let checked_in = fs::read_to_string(&path).unwrap_or_default();
    let differs = text.lines().zip(checked_in.lines()).position(|(a, b)| a != b).unwrap_or(checked_in.lines().count());
    assert!(
        text == checked_in,
        "include/reshard.h is not what the sources say, from line {} on: RESHARD_BLESS=1 cargo test --test header",
        differs + 1
    );
}

/// Compiles a file that includes nothing but `header`, twice.
fn compiles(compiler: &str, standard: &str, suffix: &str, header: &str) {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let source = folder.join(format!("{}.{standard}.{suffix}", header.replace('.', "_")));
    fs::write(&source, format!("#include \"{header}\"\n#include \"{header}\"\nint main(void) {{ return RS_IS_FATAL(RS_OK); }}\n"))
        .unwrap();
    let out = Command::new(compiler)
        .args([&format!("-std={standard}"), "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-I"])
        .arg(root().join("include"))
        .arg(&source)
        .output()
        .unwrap_or_else(|e| panic!("{compiler}: {e}"));
    assert!(out.status.success(), "{header} as {standard}:\n{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn the_headers_compile_alone() {
    compiles("cc", "c99", "c", "reshard.h");
    compiles("cc", "c11", "c", "reshard.h");
    compiles("c++", "c++11", "cpp", "reshard.h");
    compiles("c++", "c++17", "cpp", "reshard.hpp");
}
