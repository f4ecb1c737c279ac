from __future__ import annotations

import platform

import pytest

from matvae import processor


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx avx2 avx512f avx512_bf16\n", "AMD EPYC (AVX-512, bfloat16)"),
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx avx2\nmodel name\t: another\n", "AMD EPYC (AVX2)"),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 sve\n", f"{platform.machine()} (SVE, bfloat16)"),
        ("model name\t: an old one\nflags\t\t: fpu sse2\n", "an old one"),
        ("", platform.machine()),
    ],
)
def test_processors_of_one_name_are_told_apart(tmp_path, monkeypatch, told, name):
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(told)
    assert processor.processor() == name


def test_without_linux_it_is_what_the_system_says(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "none")
    assert processor.processor() == "arm"
