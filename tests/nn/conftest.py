import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()  # it limits how many graphs one function may have
