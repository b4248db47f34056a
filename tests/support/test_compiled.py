"""--compile: the compiled networks only train; what is saved and measured are the plain ones."""
import pytest
import torch
from test_bad_input import refused

import train
from models import create_model
from support.errors import UserError

TIMED = {"seconds", "images_per_second"}


@pytest.fixture
def calls(monkeypatch):
    """torch.compile without a compiler. A list of (network, rows) of the calls that reach it."""
    seen = []

    def compile(network, dynamic):
        def forward(images):
            seen.append((network, len(images)))
            return network(images)
        return forward
    monkeypatch.setattr(torch, "compile", compile)
    return seen


def numbers(history):
    return [{k: v for k, v in row.items() if k not in TIMED} for row in history]


def test_a_run_goes_on_with_it_and_without(short, calls):
    """Two steps of 50 images and a tail of 20, which runs plainly."""
    plain = train.run(short(epochs=2, batch_size=50), "plain")
    assert not calls
    quick = train.run(short(epochs=2, batch_size=50, compile=True), "quick")
    assert [rows for _, rows in calls] == 4 * [50, 50, 100]
    assert numbers(quick) == numbers(plain)
    saved, other = (torch.load(f"{name}/last.pt", weights_only=True)["model"]
                    for name in ("quick", "plain"))
    assert saved.keys() == other.keys() and all(torch.equal(saved[k], other[k]) for k in other)
    calls.clear()
    assert train.run(train.Settings(compile=False), "quick", resume=True) == quick
    assert train.run(train.Settings(compile=True), "plain", resume=True) == plain


def test_the_learner_keeps_the_plain_student(short, calls):
    s = train.resolve(short(compile=True))
    data = train.load(s.dataset, s.data_dir, s.image_size)
    learner = train.begin(s, data, torch.device("cpu"), None, None)
    images = torch.zeros(4, 3, 16, 16)
    learner.parallel(images)
    assert calls == [(learner.student, 4)] and isinstance(learner.student, torch.nn.Module)
    learner.teacher(images)
    assert calls[1][0] is not learner.student


def test_where_there_is_no_compiler(base, command, color_teacher, monkeypatch):
    def compile(network, dynamic):
        def forward(images):
            raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: none found\n\n"
                               "Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace")
        return forward
    monkeypatch.setattr(torch, "compile", compile)
    refused(command(train, *base, "--teacher-checkpoint", color_teacher, "--compile"),
            "--compile: torch.compile does not work here (backend='inductor' raised: "
            "InvalidCxxCompiler: none found); leave it out; no epoch is saved")


@pytest.mark.slow
def test_the_compiled_networks_give_the_same_logits_and_gradients(short):
    s = train.resolve(short(compile=True))
    data = train.load(s.dataset, s.data_dir, s.image_size)
    learner = train.begin(s, data, torch.device("cpu"), None, None)
    images, found = torch.randn(8, 3, 16, 16), []
    teacher = create_model("resnet8", 3)
    teacher.load_state_dict(torch.load(s.teacher_checkpoint, weights_only=True)["model"])
    learner.student.train()
    try:
        quick = learner.teacher(images)
    except UserError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(quick, teacher.eval()(images), rtol=1e-4, atol=1e-4)
    for network in (learner.parallel, learner.student):
        learner.student.zero_grad()
        logits = network(images)
        logits.square().mean().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in learner.student.parameters())])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
