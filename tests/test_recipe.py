"""Recipes: what is read, what is refused and how, and that what is saved can be read again."""

import pytest
import yaml

from dite.errors import RecipeError
from dite.quant.scheme import ActivationScheme, LayerScheme
from dite.recipe import load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_built_in_recipe_is_valid_and_bears_its_own_name(name):
    assert load_recipe(name).name == name


@pytest.mark.parametrize("name", recipe_names())
def test_a_resolved_recipe_is_valid_input_again(name, tmp_path):
    recipe = load_recipe(name, ["defaults.token.weight.group_size=64"])
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False))
    assert load_recipe(path) == recipe


def test_a_recipe_is_read_by_name_file_dict_or_object(tmp_path):
    recipe = load_recipe("w4a8")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(tmp_path / "r.yaml") == load_recipe(recipe.model_dump(mode="json")) == load_recipe(recipe) == recipe


def test_an_override_changes_one_key_and_leaves_its_neighbours():
    recipe = load_recipe("w4a8", ["defaults.token.weight.group_size=64"])
    assert recipe.defaults.token.weight.group_size == 64
    assert recipe.defaults.token.weight.num_bits == 4
    assert recipe.defaults.conditioning == load_recipe("w4a8").defaults.conditioning


def test_overrides_never_change_the_recipe_they_were_given():
    recipe = load_recipe("w4a8")
    load_recipe(recipe, ["defaults.token.weight.group_size=null", "defaults.token.activation=null"])
    assert recipe == load_recipe("w4a8")


def test_the_last_override_of_a_key_wins():
    assert load_recipe("w4a8", ["defaults.token.weight.num_bits=6", "defaults.token.weight.num_bits=8"]).defaults.token.weight.num_bits == 8


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("defaults.token.weigth.num_bits=8", "did you mean weight?"),
        ("defaults.token.weight.group_sise=64", "did you mean group_size?"),
        ("tranform=none", "did you mean transform?"),
        ("defaults.token.weight.group_size=100", "multiple of 16"),
        ("defaults.token.weight.group_size=-64", "multiple of 16"),
        ("defaults.token.weight.num_bits=5", "4, 6 or 8"),
        ("defaults.token.weight.num_bits", "the form is key.key=value"),
        ("=4", "the form is key.key=value"),
        ("name.first=x", "goes too deep"),
    ],
)
def test_a_wrong_override_is_answered_with_the_rule(override, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe("w4a8", [override])
    assert words in str(caught.value)


def test_an_override_that_is_not_yaml_is_a_recipe_error():
    with pytest.raises(RecipeError):
        load_recipe("w4a8", ["defaults.token.weight={"])


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(RecipeError, match="did you mean w4a8"):
        load_recipe("w4a9")


@pytest.mark.parametrize("text", ["", "- a list", "just words", "{", "name: [", "\t- x: 1"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(path)


def test_a_missing_file_is_refused_by_its_name(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_yaml_cannot_build_python_objects(tmp_path):
    path = tmp_path / "hostile.yaml"
    path.write_text("name: !!python/object/apply:os.system ['true']")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(path)


def test_token_and_conditioning_linears_get_their_own_scheme():
    recipe = load_recipe("w4a8")
    token, conditioning = recipe.scheme("blocks.0.ff.net.2", "token"), recipe.scheme("blocks.0.norm1.linear", "conditioning")
    assert isinstance(token, LayerScheme) and token.activation == ActivationScheme()
    assert conditioning.activation is None


def test_a_pattern_changes_only_the_keys_it_gives():
    recipe = load_recipe("w4a8", ["layers={'*.ff.*': {weight: {num_bits: 8}}}"])
    scheme = recipe.scheme("blocks.0.ff.net.2", "token")
    assert (scheme.weight.num_bits, scheme.weight.group_size) == (8, 128)
    assert recipe.scheme("blocks.0.attn1.to_q", "token").weight.num_bits == 4


def test_a_skipped_layer_says_why_and_a_later_pattern_can_take_it_back():
    skip = {"*.ff.*": {"skip": "too sensitive"}}
    recipe = load_recipe(load_recipe("w4a8").model_dump(mode="json") | {"layers": skip})
    assert recipe.scheme("blocks.0.ff.net.2", "token") == "too sensitive"
    recipe = load_recipe(load_recipe("w4a8").model_dump(mode="json") | {"layers": skip | {"*.net.2": {"weight": {"num_bits": 8}}}})
    assert recipe.scheme("blocks.0.ff.net.2", "token").weight.num_bits == 8


def test_a_kind_without_weight_scheme_is_left_alone():
    recipe = load_recipe("w4a8", ["defaults.conditioning.weight=null"])
    assert recipe.scheme("blocks.0.norm1.linear", "conditioning") == "the recipe leaves conditioning linears alone"


def test_a_pattern_with_weight_null_leaves_its_layers_alone():
    recipe = load_recipe("w4a8", ["layers={'*attn1*': {weight: null}}"])
    assert "leaves it alone" in recipe.scheme("blocks.0.attn1.to_q", "token")
    assert not isinstance(recipe.scheme("blocks.0.ff.net.0", "token"), str)


def test_a_layer_can_be_named_whole_in_an_override():
    recipe = load_recipe("w4a8", ["layers.blocks.0.attn1.to_q.weight.num_bits=8", "layers.blocks.1.ff.skip=fragile"])
    assert recipe.scheme("blocks.0.attn1.to_q", "token").weight.num_bits == 8
    assert recipe.scheme("blocks.0.attn1.to_k", "token").weight.num_bits == 4
    assert recipe.scheme("blocks.1.ff", "token") == "fragile"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nname: b\n", "name appears twice"),
        ("name: a\ndefaults:\n  token: {weight: {num_bits: 4, num_bits: 8}}\n", "num_bits appears twice"),
    ],
)
def test_a_key_given_twice_is_an_error(tmp_path, text, words):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=words):
        load_recipe(tmp_path / "r.yaml")


def test_a_recipe_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(tmp_path / "r.yaml")


def test_activations_without_weights_are_refused():
    with pytest.raises(RecipeError, match="together with the weight"):
        load_recipe("w4a8", ["defaults.token.weight=null"])


def test_every_error_about_a_key_says_what_to_try():
    with pytest.raises(RecipeError) as caught:
        load_recipe("w4a8", ["zzz=64"])
    assert caught.value.hint
