//! A long file or function is a sign of a missing concept; unsafe code has its place.

use std::path::{Path, PathBuf};

const FILE_MAX: usize = 800;
const FUNCTION_MAX: usize = 70;

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if path.file_name().is_none_or(|name| name != "target") {
                sources(&path, found);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn all() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    for folder in ["src", "drivers", "tools", "tests"] {
        sources(&root.join(folder), &mut found);
    }
    assert!(found.len() > 40);
    found.into_iter().map(|path| (path.clone(), std::fs::read_to_string(path).unwrap())).collect()
}

/// Functions of formatted code: name and number of lines.
fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<_> = text.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let words: Vec<_> = line.split_whitespace().collect();
        let Some(at) = words.iter().take(5).position(|word| *word == "fn") else { continue };
        let closing = format!("{}}}", " ".repeat(indent));
        if let Some(end) = lines[start..].iter().position(|line| *line == closing || line.ends_with("; // fn")) {
            found.push((words.get(at + 1).unwrap_or(&"").to_string(), end + 1));
        }
    }
    found
}

#[test]
fn no_file_and_no_function_is_too_long() {
    let mut wrong = Vec::new();
    for (path, text) in all() {
        let lines = text.lines().count();
        if lines > FILE_MAX {
            wrong.push(format!("{}: {lines} lines", path.display()));
        }
        for (name, lines) in functions(&text).into_iter().filter(|(_, lines)| *lines > FUNCTION_MAX) {
            wrong.push(format!("{}: {name}: {lines} lines", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_measure_of_a_function_is_right() {
    let text = "impl X {\n    pub fn long(\n        a: u8,\n    ) {\n        if a {\n        }\n    }\n}\n";
    assert_eq!(functions(text), [("long(".to_owned(), 6)]);
}

#[test]
fn unsafe_code_is_in_src_sys_only() {
    for (path, text) in all() {
        let sys = path.components().any(|part| part.as_os_str() == "sys");
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        let found =
            code.filter(|line| line.contains(concat!("un", "safe {")) || line.contains(concat!("un", "safe impl")));
        assert!(sys || found.count() == 0, "{}", path.display());
    }
}

/// A thread that is made by `blocking::spawn` has leave to wait; and who makes one, needs it.
#[test]
fn threads_are_made_in_one_place() {
    let allowed = ["src/blocking.rs", "src/sys/aio.rs", "src/sys/uring_tests.rs"];
    for (path, text) in all() {
        let name = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap();
        if !name.starts_with("src") || allowed.iter().any(|allowed| name == Path::new(allowed)) {
            continue;
        }
        let code = text.split("#[cfg(test)]").next().unwrap();
        for what in ["thread::Builder", "thread::spawn", "thread::current"] {
            assert!(!code.contains(what), "{}: {what}", name.display());
        }
    }
}

/// Leave to wait comes with a thread. What has no main loop, or none yet, gives it to itself: programs and their tests.
#[test]
fn leave_to_wait_is_not_made_up() {
    for (path, text) in all() {
        let name = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap();
        let of_program = ["src/main.rs", "src/blocking.rs", "src/sys/uring_tests.rs"].map(Path::new).contains(&name);
        if name.starts_with("src") && !of_program && !name.ends_with("tests.rs") {
            let code = text.split("#[cfg(test)]").next().unwrap();
            assert!(!code.contains("before_main_loop("), "{}", name.display());
        }
    }
}
