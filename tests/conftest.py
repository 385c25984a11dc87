"""What every test needs: the repository's root on the path, few threads, and real files where there are some."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)        # tiny models: more threads only wait for each other


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real weights, tokenizer files, configs and reference values; not part of the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the real files of ../shared/data, which is absent")
    return folder
