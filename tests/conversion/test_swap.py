import weakref

from torch import nn

from ipex_quant.conversion.swap import swap_modules


def test_an_old_module_is_gone_before_the_next_new_one_is_made():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    alive = [weakref.ref(module) for module in model]
    seen = []

    def make(module):
        seen.append([ref() is not None for ref in alive])
        return nn.Identity()

    assert swap_modules(model, dict.fromkeys("012", make)) is model
    assert seen == [[True, True, True], [False, True, True], [False, False, True]]


def test_modules_inside_modules_are_found():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU())
    swapped = swap_modules(model, {"0.0": lambda module: nn.Identity()})
    assert swapped is model
    assert isinstance(model[0][0], nn.Identity)
