"""The studies on a Gaussian mixture with its exact noise: they agree with each other where they measure the same."""

import multiprocessing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import measuring, runs

pytestmark = pytest.mark.slow
SEEDS, SAMPLES, STEPS = 2, 32, [5, 10]


def run_studies(folder) -> dict:
    """What each study finds. In a process of its own: programs define flags."""
    from benchmarks import ems_budget, few_steps, ingredients, inverse, samplers, study
    from configs import digits
    from ems import statistics
    from experiments import quality
    from score_sde import sde
    from score_sde.denoiser import Diffusion
    from score_sde.metrics import features, resnet
    from score_sde.space import pixels
    from tests.mixture import Mixture

    study.FOLDER = runs.RUNS = folder
    samplers.PREDICTORS = {"reverse diffusion": samplers.PREDICTORS["reverse diffusion"]}
    few = ("DDIM", "SDE-DPM-Solver++ 2M", "DEIS tAB3", "F-PNDM", "DPM-Solver-v3")
    inverse.SOLVERS, inverse.METHODS = ("dpmpp",), ("ddnm",)
    few_steps.SOLVERS = {name: few_steps.SOLVERS[name] for name in few}
    mixture, shape = Mixture.reference(), (8, 8, 3)
    levels = lambda name, n: ((mixture.sample(name, n) + 1) * 127.5).clip(0, 255).astype(np.uint8)
    splits = dict(train_images=levels("train", 64), test_images=levels("test", 16))
    np.savez(folder / "mixture.npz", **splits)
    resnet.save(
        folder / "resnet20_mixture.npz",
        resnet.ResNet20(2).init(jax.random.key(0), jnp.zeros((1, *shape)))["params"],
        dict(image_shape=shape, num_classes=2),
    )
    network = features.local(folder / "resnet20_mixture.npz")

    config = digits.get_config()
    with config.unlocked():
        config.data.update(dict(dataset=str(folder / "mixture.npz"), num_channels=3))
        config.ems.batch_size = 16
        config.eval.fine_steps = 200
    vp = sde.VP(t_min=0.02)
    exact = Diffusion(vp, pixels(shape), None, lambda params, y=None, keys=None: mixture.noise_fn(vp))
    model = runs.Model(folder / "vp", config, exact, {"none": jnp.zeros(1)}, 0, "mixture")
    ems = statistics.load(measuring.measure(model, nodes=132, num_data=64, batch_size=16))
    compared = few_steps.compared(model, ems, network, STEPS, SAMPLES)
    compared["seconds"] = few_steps.timed(model, ems, 1)
    return dict(
        few_steps=compared,
        text="\n".join(few_steps.shown(model, network, compared)),
        ingredients=ingredients.compared(model, ems, STEPS, SAMPLES),
        ems_budget=ems_budget.compared(model, [33, 66, 132], SEEDS, SAMPLES),
        samplers=samplers.compared(model, network, 25, SAMPLES, SEEDS),
        inverse=inverse.compared(model, network, ["inpaint", "super_resolve"], 16, 10, 25),
        psnr_of_others=quality.psnr(splits["test_images"], np.roll(splits["test_images"], 1, 0)),
        psnr=quality.psnr(np.full((2, 4, 4, 1), 9), np.full((2, 4, 4, 1), 5)),
        files=sorted(path.name for path in folder.iterdir()),
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        studies = pool.apply_async(run_studies, [tmp_path_factory.mktemp("benchmarks")])
        return studies.get(timeout=1200)  # an error that cannot be pickled would be waited for without end


def test_studies_agree_on_the_solvers_they_share(found):
    own = {name: [rms for rms, _ in row] for name, row in found["few_steps"]["own"].items()}
    ingredients = found["ingredients"]
    # of DPM-Solver-v3 with l = 1, whose integrals are trapezoids over the nodes
    np.testing.assert_allclose(ingredients["order 1: DDIM"], own["DDIM"], rtol=5e-3)
    published = ingredients["published options for the number of evaluations"]
    np.testing.assert_allclose(own["DPM-Solver-v3"], published, rtol=1e-4)
    assert published[1] < published[0]  # ten evaluations come nearer than five
    assert len({row[0] for row in ingredients.values()}) == len(ingredients)  # no ingredient is without effect


def test_best_grids(found):
    """Chosen on other noises, they are nearer on these too, on the whole; the tables and the picture are written."""
    study, nearer = found["few_steps"], []
    for name, row in study["best"].items():
        for best, own in zip(row, study["own"][name], strict=True):
            if own[0] is not None:
                nearer.append(np.log(best[0] / own[0]))
    assert np.mean(nearer) < -0.05
    assert f"| DDIM | {study['own']['DDIM'][0][0]:#.4g} |" in found["text"]
    assert "few_steps_vp.png" in found["files"]


def test_solvers_without_a_distance(found):
    """Samples of a stochastic solver have a Frechet distance alone; F-PNDM has none in fewer than 12 evaluations."""
    study = found["few_steps"]
    assert [rms for rms, _ in study["own"]["SDE-DPM-Solver++ 2M"]] == [None, None]
    assert np.isfinite([distance for _, distance in study["own"]["SDE-DPM-Solver++ 2M"]]).all()
    assert study["own"]["F-PNDM"] == study["best"]["F-PNDM"] == [(None, None)] * 2
    assert set(study["seconds"]) == set(study["own"])
    assert "| F-PNDM | - | - |" in found["text"]
    assert found["text"].count("| SDE-DPM-Solver++ 2M |") == 3  # two tables of Frechet distances, one of seconds


def test_reference_budget_is_what_ems_measures(found):
    """The largest budget's statistics are those of python -m ems with as many nodes and images."""
    largest, reference, budgets = found["ems_budget"]
    assert largest == (132, 64)
    published = [rms for rms, _ in found["few_steps"]["own"]["DPM-Solver-v3"]]
    np.testing.assert_allclose([reference[0], reference[3]], published, rtol=1e-3)
    assert list(budgets) == [(nodes, images) for nodes in (33, 66) for images in (16, 32, 48, 64)]
    assert np.shape(list(budgets.values())) == (8, SEEDS, 4)
    assert not [name for name in found["files"] if "partial" in name]


def test_distances_of_samplers(found):
    cells, floor, floor_images = found["samplers"]
    assert floor > 0
    assert floor_images == 16
    (row,) = cells.values()
    values = np.array(list(row.values()))
    assert values.shape == (4, SEEDS)
    assert np.isfinite(values).all()
    assert len(np.unique(values)) == values.size  # other samples in every column and with every seed


def test_inverse_problems_by_few_evaluations_and_by_many(found):
    """Samples of what was measured are nearer to the images than others of the data are; floors are the images'."""
    study, floor = found["inverse"]
    assert found["psnr"] == pytest.approx(20 * np.log10(255 / 4))
    assert list(study["inpaint"]) == ["ddnm, dpmpp", "predictor-corrector"]
    assert list(study["super_resolve"]) == ["ddnm, dpmpp"]
    assert [row[0] for row in study["inpaint"].values()] == [10, 25]
    for rows in study.values():
        for _, psnr, distance, seconds in rows.values():
            assert psnr > found["psnr_of_others"] + 1
            assert distance > floor / 2
            assert seconds > 0


def page(result):
    """A page of two works, one of which takes too long to compile. In a process of its own: programs define flags."""
    import contextlib
    import io
    import time

    from benchmarks import accelerator

    accelerator.PRODUCT, accelerator.COPIED = 64, 2**12
    double = jax.jit(lambda x: 2 * x)
    quick = accelerator.Work(double, {"forward, default": (jnp.ones((8, 8)),)}, 8, "default")
    works = {"quick": lambda: quick, "slow": lambda: time.sleep(60)}
    until = time.monotonic() + 20
    with contextlib.redirect_stdout(io.StringIO()) as out:
        accelerator.THREADS = 1
        compiled = accelerator.compile_all(works, lambda: max(0.0, until - time.monotonic()))
        accelerator.times(compiled, operations=1e6)
    result.put((list(compiled), out.getvalue()))


def test_a_page_about_an_accelerator_shows_what_is_compiled_in_time():
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=page, args=(result,))
    process.start()
    compiled, text = result.get(timeout=120)
    process.kill()
    assert compiled == ["quick"]
    (row,) = [line for line in text.splitlines() if line.startswith("| forward")]
    images, forwards = row.split("|")[2], row.split("|")[7]
    assert float(images) > 0
    assert float(forwards) == 1
