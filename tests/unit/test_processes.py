import subprocess
import sys

ORPHAN = """
import multiprocessing, os, sys, time
from pathlib import Path
from rlad_megatron.processes import end_with_parent

folder = Path(sys.argv[1])

def child():
    parent = os.getppid()
    (folder / "started").touch()
    while os.getppid() == parent:
        time.sleep(0.01)
    end_with_parent()
    (folder / "goes_on").touch()

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=child).start()
    while not (folder / "started").exists():
        time.sleep(0.01)
    os._exit(0)
"""


def test_a_process_whose_parent_is_gone_when_it_asks_for_the_signal_ends(tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    # The output ends with the last of both processes.
    subprocess.run([sys.executable, script, tmp_path], stdout=subprocess.PIPE, check=True, timeout=120)
    assert (tmp_path / "started").exists() and not (tmp_path / "goes_on").exists()


IMPORTS = """
import gc
from rlad_megatron.processes import quick_imports

try:
    with quick_imports():
        assert not gc.isenabled()
        import no_such_module
except ModuleNotFoundError:
    pass
assert gc.isenabled() and gc.get_freeze_count() > 0
"""


def test_garbage_is_searched_for_again_after_imports_even_if_one_fails():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, timeout=120)
