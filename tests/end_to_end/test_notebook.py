"""`rlkit.train` and `rlkit.evaluate` in a Jupyter kernel, which already runs an event loop."""

import nbclient
import nbformat
import pytest
import yaml

from tests.quick import QUICK, QUICK_GRPO

CELLS = (
    "import rlkit",
    "result = rlkit.train('quick.yaml', max_steps=2, environment_args={'length': 2})",
    "print(result.directory, list(result.evaluations), result.metrics['reward'].dropna().size)",
    "after = rlkit.evaluate(result.directory / 'model', ENVIRONMENT, evaluation_tasks=4)\nafter.metric",
    "rlkit.train('quick.yaml', learning_rat=1)",
)


@pytest.mark.slow
def test_notebook_trains_and_evaluates(tmp_path, tiny_folder):
    keys = QUICK_GRPO | {"model_name_or_path": tiny_folder}
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump(keys))
    cells = [cell.replace("ENVIRONMENT", repr(QUICK["environment"])) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = nbclient.NotebookClient(
        notebook, timeout=600, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    *valid, invalid = notebook.cells  # the last cell has a misspelled key
    outputs = ["".join(output.get("text", "") for output in cell.outputs) for cell in valid]
    assert not [output for cell in valid for output in cell.outputs if output.output_type == "error"]
    assert "runs/quick ['before', 'after'] 2" in outputs[2]
    assert valid[3].outputs[-1]["data"]["text/plain"] == "'even'"
    (error,) = [output for output in invalid.outputs if output.output_type == "error"]
    assert error.ename == "UserError" and "did you mean 'learning_rate'" in error.evalue
