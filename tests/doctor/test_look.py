"""Looking at this machine: true, quick, and never an error where something is missing."""

import platform
import socket
import sys
import sysconfig
from dataclasses import replace

import pytest
import torch
from doctor_machines import A100

import heedful
from heedful import AttentionStrategyFactory
from heedful.doctor import look as looking
from heedful.doctor.environment import Found
from heedful.doctor.look import jobs, look, said
from heedful.facts import Facts, probe

STRATEGIES = AttentionStrategyFactory(plugins=False).strategies()


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(looking, "_reachable", lambda address: "//mirror.example.org" in address)
    tried = []

    def trial(wanted):
        tried.extend(wanted)
        return tuple(Found(job.distribution, job.version, job.module) for job in tried)

    return look(STRATEGIES, environ={"PIP_INDEX_URL": "https://mirror.example.org/simple"}, trial=trial)


def test_it_says_what_python_and_torch_say(here):
    assert (here.executable, here.python, here.system) == (sys.executable, platform.python_version(), platform.system())
    assert here.torch == torch.__version__
    assert here.cuda == (torch.version.cuda or "")
    assert here.python_tag.startswith(f"cp{sys.version_info.major}{sys.version_info.minor}")
    assert here.cores >= 1
    assert 0 < here.memory_gib < 100_000
    assert (here.index, here.online) == ("mirror.example.org", True)
    assert here.package("pip") is None  # no package with kernels
    assert here.pip


def test_packages_with_kernels_are_found_and_those_of_builds_are_only_listed(here):
    names = {one.distribution for one in here.packages}
    assert {"kernels"} <= names
    assert here.package("packaging").module == ""
    assert here.package("kernels").module == "kernels"


def test_each_installed_package_is_one_job_with_the_strategies_that_its_gpu_takes():
    versions = {"flash_attn.flash_attn_interface": "2.8.3", "flash-attn": "2.8.3", "xformers.ops.fmha": "0.0.20",
                "xformers": "0.0.20", "torch.nn.attention.varlen": "2.13.0", "torch": "2.13.0"}  # fmt: skip
    facts = replace(probe(), packages=versions)
    found = {job.distribution: job for job in jobs(facts, STRATEGIES, (A100,))}
    flash = found["flash-attn"]
    assert (flash.module, flash.version, flash.strategies, flash.device) == (
        "flash_attn.flash_attn_interface", "2.8.3", ("flash",), "cuda:0",
    )  # fmt: skip
    assert found["xformers"].strategies == ()  # too old to be tried, and imported all the same
    assert found["torch"].strategies == ("native_varlen",)
    assert "aiter" not in found
    assert "torch" not in {job.distribution for job in jobs(facts, STRATEGIES, ())}


def test_half_an_install_is_looked_at_too(tmp_path, monkeypatch):
    info = tmp_path / "xformers-0.0.35.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.35\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = {job.distribution: job for job in jobs(replace(probe(), packages={}), STRATEGIES, (A100,))}
    assert (found["xformers"].version, found["xformers"].strategies) == ("0.0.35", ())


def test_a_program_that_is_not_there_fails_or_hangs_says_nothing():
    assert said("no-such-program-anywhere") == ""
    assert said(sys.executable, "-c", "import sys; print('x'); sys.exit(1)") == ""
    assert said(sys.executable, "-c", "print(' x ')") == "x"


def test_the_limits_of_a_container_count(tmp_path, monkeypatch):
    monkeypatch.setattr(looking, "_CGROUP", tmp_path)
    free = looking._free_bytes()
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert abs(looking._free_bytes() - free) < 2**30
    (tmp_path / "memory.max").write_text("5000\n")
    assert looking._free_bytes() == 4000


def test_an_embedded_python_is_told_by_its_path_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python.exe"))
    before = looking._layout()
    (tmp_path / "python312._pth").write_text("python312.zip\n")
    assert (before == "embedded", looking._layout()) == (False, "embedded")


def test_cuda_is_found_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    nvcc = tmp_path / "cuda 13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.86'\n")
    nvcc.chmod(0o755)
    home = looking._cuda_home({"CUDA_HOME": str(tmp_path / "cuda 13")})
    assert home == str(tmp_path / "cuda 13")
    assert looking._nvcc(home) == "12.9"
    assert looking._nvcc("") == ""


def test_a_folder_is_tried_not_asked(tmp_path):
    assert looking._writable(tmp_path)
    assert not looking._writable(tmp_path / "absent")


def test_an_index_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://127.0.0.1:9"})
    assert not looking._reachable("https://pypi.org/simple")


def test_an_index_on_a_port_of_its_own_is_asked_there(monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert looking._reachable(f"http://127.0.0.1:{server.getsockname()[1]}/simple")
    assert looking._host("http://mirror/simple", {"http": 80}) == ("mirror", 80)
    assert looking._host("https://mirror/simple", {"http": 80}) == ("mirror", 443)


@pytest.mark.parametrize("address", ["http://[::1", "http://mirror:port/simple", "mirror"])
def test_a_malformed_address_is_no_error(monkeypatch, address):
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": address})
    assert looking._host(address, {})[0] == ""
    monkeypatch.setattr(socket, "create_connection", lambda *to, timeout: (_ for _ in ()).throw(OSError("none")))
    assert not looking._reachable(address)


def test_pips_own_configuration_counts(monkeypatch):
    configured = "global.index-url='https://a.example/simple'\nglobal.timeout='60'\n"
    monkeypatch.setattr(looking, "said", lambda *command: configured)
    assert looking._index({}) == "https://a.example/simple"
    assert looking._index({"PIP_INDEX_URL": "https://b.example"}) == "https://b.example"
    monkeypatch.setattr(looking, "said", lambda *command: f"{configured}install.index-url='https://c.example'")
    assert looking._index({}) == "https://c.example"
    monkeypatch.setattr(looking, "said", lambda *command: "")
    assert looking._index({}) == "https://pypi.org/simple"


def test_free_threading_is_part_of_the_tag(monkeypatch):
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: 1 if name == "Py_GIL_DISABLED" else None)
    assert looking._python_tag().endswith("t")


def test_a_system_that_forbids_pip_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    assert not looking._managed()
    (tmp_path / "EXTERNALLY-MANAGED").write_text("[externally-managed]\n")
    assert looking._managed()


def test_the_facts_can_be_given():
    facts = Facts("2.6.0", "3.12", "Linux", {"cuda:0": A100}, {})
    found = look(STRATEGIES, facts=facts, environ={}, trial=lambda wanted: ())
    assert (found.torch, found.gpus, found.device, found.packages) == ("2.6.0", (A100,), "cuda", ())
    assert isinstance(heedful.__version__, str)
