import pytest
import torch

pytest.importorskip("sklearn")

from personae.demo.digits import TASKS, TEST_IMAGES, tasks


def test_tasks_are_the_same_every_time_and_well_formed():
    one, again = tasks(), tasks()
    for name, task in one.items():
        assert name == task.name
        for examples, others in ((task.train, again[name].train), (task.test, again[name].test)):
            assert torch.equal(examples["pixel_values"], others["pixel_values"])
            assert examples["pixel_values"].shape[1:] == (1, 8, 8)
            assert examples["pixel_values"].abs().max() <= 1
            assert len(examples["pixel_values"]) == len(examples["labels"])
            assert set(examples["labels"].tolist()) == set(range(len(task.classes)))


def test_no_test_image_is_trained_on():
    digit = tasks()["digit"]
    assert len(digit.test["labels"]) == TEST_IMAGES
    assert len(digit.train["labels"]) + TEST_IMAGES == 1797


def test_what_each_task_shows():
    image = torch.arange(64.0).reshape(1, 8, 8)
    ask = {name: function for name, (function, _) in TASKS.items()}
    seven = torch.tensor([7])
    assert ask["parity"](image, seven)[1].tolist() == [1]
    mirrored, labels = ask["negative"](image, seven)
    assert mirrored[0, 0, 0] == -7 and labels.tolist() == [7]
    scrambled, _ = ask["scrambled"](image, seven)
    assert sorted(scrambled.flatten().tolist()) == list(range(64))
    assert not torch.equal(scrambled, image)
    shown, quarters = ask["turned"](
        image.repeat(3, 1, 1) + torch.tensor([0.0, 100.0, 200.0])[:, None, None],
        torch.tensor([7, 8, 2]),  # 8 is left out
    )
    # images 0 and 2 once more each: quarters 0 1 2 3; a quarter to the left brings the upper
    # right corner (7 in the first image) to the upper left, half a turn the lower right (63)
    assert quarters.tolist() == [0, 1, 2, 3]
    assert shown[:, 0, 0].tolist() == [0.0, 207.0, 63.0, 256.0]
