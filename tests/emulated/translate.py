"""Turns kernels into C++ for a CPU: `__shared__` becomes memory of each block, inline PTX what it means.

All else the emulator's header says.
"""

from __future__ import annotations

import re

_PTX = (
    (r"", ""),
    (r"mov\.u64 %0, %%globaltimer;", "%0 = emu::now();"),
    (r"ld\.(relaxed|acquire)\.(sys|gpu)\.global\.u(32|64) %0, \[%1\];", "%0 = emu::load(%1);"),
    (r"st\.relaxed\.sys\.global\.u(32|64) \[%0\], %1;", "emu::store(%0, %1);"),
    (r"st\.release\.sys\.global\.u(32|64) \[%0\], %1;", "emu::store_release(%0, %1);"),
    (r"atom\.add\.acq_rel\.gpu\.global\.u32 %0, \[%1\], %2;", "emu::release(); %0 = emu::add(%1, %2);"),
    (r"red\.release\.gpu\.global\.add\.u32 \[%0\], %1;", "emu::release(); emu::add(%0, %1);"),
    (
        r"ld\.global\.L1::no_allocate\.v4\.u32 {%0, %1, %2, %3}, \[%4\];",
        "const auto& from = *%4; %0 = from.word[0], %1 = from.word[1], %2 = from.word[2], %3 = from.word[3];",
    ),
    (
        r"st\.global\.cs\.v4\.u32 \[%0\], {%1, %2, %3, %4};",
        "auto& to = *%0; to.word[0] = %1, to.word[1] = %2, to.word[2] = %3, to.word[3] = %4;",
    ),
    (
        r"{ \.reg \.b128 v; mov\.b128 v, {%1, %2}; st\.relaxed\.sys\.global\.b128 \[%0\], v; }",
        "const uint64_t halves[2] = {%1, %2}; emu::send(%0, halves, 16); emu::yield();",
    ),
    (
        r"{ \.reg \.b128 v; ld\.relaxed\.sys\.global\.b128 v, \[%2\]; mov\.b128 {%0, %1}, v; }",
        "uint64_t halves[2]; emu::yield(); memcpy(halves, %2, 16); %0 = halves[0], %1 = halves[1];",
    ),
    (r"barrier\.sync %0, %1;", "emu::barrier(%0, %1);"),
    (r"barrier\.arrive %0, %1;", "emu::arrive(%0, %1);"),
    (
        r"{ \.reg \.pred mine, some; setp\.ne\.u32 mine, %1, 0; bar\.red\.or\.pred some, %2, %3, mine; .*}",
        "%0 = emu::barrier(%2, %3, %1 != 0);",
    ),
    (r"griddepcontrol\.wait;", "emu::await_turn();"),
    (r"griddepcontrol\.launch_dependents;", "emu::let_next_start();"),
    (r"fence\.acq_rel\.sys;", "emu::release();"),
    (r"fence\.(proxy\.async|mbarrier_init\.release\.cluster);", ""),
    (r"mbarrier\.init\.shared::cta\.b64 \[%0\], %1;", "emu::init_arrivals(%0, %1);"),
    (r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, \[%0\], %1;", "emu::expect_bytes(%0, %1);"),
    (
        r"{ \.reg \.pred p; mbarrier\.try_wait\.parity\.shared::cta\.b64 p, \[%1\], %2; .*}",
        "%0 = emu::has_ended(%1, %2);",
    ),
    (
        r"cp\.async\.bulk\.shared::cluster\.global\.mbarrier::complete_tx::bytes \[%0\], \[%1\], %2, \[%3\];",
        "emu::bulk_load(%0, %1, %2, %3);",
    ),
    (r"cp\.async\.bulk\.global\.shared::cta\.bulk_group \[%0\], \[%1\], %2;", "emu::bulk_store(%0, %1, %2);"),
    (r"cp\.async\.bulk\.prefetch\.L2\.global \[%0\], %1;", ""),
    (r"cp\.async\.bulk\.commit_group;", "emu::bulk_commit();"),
    (r"cp\.async\.bulk\.wait_group\.read 0;", "emu::bulk_wait_read();"),
    (r"cp\.async\.bulk\.wait_group 4;", "emu::bulk_wait_done(4);"),
    (r"cp\.async\.bulk\.wait_group 0;", "emu::bulk_wait_done(0);"),
    (r"cvt\.rn\.bf16x2\.f32 %0, %1, %2;", "%0 = emu::bf16_of(%1) << 16 | emu::bf16_of(%2);"),
    (r"cvt\.rn\.satfinite\.e4m3x2\.f32 %0, %1, %2;", "%0 = emu::e4m3_of(%1) << 8 | emu::e4m3_of(%2);"),
    (r"max\.bf16x2 %0, %0, %1;", "%0 = emu::max_bf16x2(%0, %1);"),
)


def translate(source: str) -> str:
    """Turn a kernel's source into C++ for the emulator."""
    source = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
        r"\1* \2 = static_cast<\1*>(emu::current->block->dynamic_shared);",
        source,
    )
    source = re.sub(r"__shared__ (\w+) ([^;]+);", _shared, source)
    parts, at = [], 0
    for match in re.finditer(r"\basm(?: volatile)?\(", source):
        end = _closing(source, match.end())
        parts += [source[at : match.start()], "{ " + _meaning(source[match.end() : end]) + " }"]
        at = end + 2  # the parenthesis and the semicolon
    return "".join(parts) + source[at:]


def _shared(declaration: re.Match[str]) -> str:
    kind, names = declaration.groups()
    each = re.findall(r"(\w+)((?:\[[^\]]*\])*)", names)
    return " ".join(f"auto& {name} = emu::shared<{kind}{sizes}>(__COUNTER__);" for name, sizes in each)


def _meaning(statement: str) -> str:
    template, *operands = _split(statement, ":")
    text = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', template)).replace("\\n", " ")
    text = re.sub(r"\s+", " ", text).strip()
    values = [
        re.fullmatch(r'\s*"[^"]*"\s*\((.*)\)\s*', one, re.DOTALL)
        for group in operands[:2]
        for one in _split(group, ",")
        if one.strip()
    ]
    for pattern, meaning in _PTX:
        if re.fullmatch(pattern, text):
            return re.sub(r"%(\d)", lambda number: f"({_value(values[int(number[1])])})", meaning)
    return f'emu::fail("no meaning is known of {text}");'


def _value(found: re.Match[str] | None) -> str:
    if found is None:
        raise ValueError("an operand of inline PTX could not be read")
    return found[1]


def _closing(text: str, start: int) -> int:
    """Find the parenthesis that closes the one before `start`."""
    depth, in_string = 1, False
    for at in range(start, len(text)):
        if text[at] == '"' and text[at - 1] != "\\":
            in_string = not in_string
        if not in_string:
            depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError("a parenthesis is not closed")


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside strings and brackets."""
    parts, depth, in_string, at = [""], 0, False, 0
    while at < len(text):
        char = text[at]
        if char == '"' and text[at - 1 : at] != "\\":
            in_string = not in_string
        if not in_string:
            depth += (char in "([{") - (char in ")]}")
            if char == separator and depth == 0:
                parts.append("")
                at += 1
                continue
        parts[-1] += char
        at += 1
    return parts
