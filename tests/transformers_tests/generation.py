"""What a model that transformers can `generate` with is expected to do: after transformers' `GenerationTesterMixin`,
which the source distribution lacks. The same calls for every class; each compares a model with itself."""

import copy

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


NEW = 5  # tokens
GREEDY = {"do_sample": False, "num_beams": 1, "min_new_tokens": NEW, "max_new_tokens": NEW}


class Generation:
    """A mixin. The test class has `model_tester` and one class in `all_model_classes`."""

    def model_and_inputs(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        torch.manual_seed(0)
        model = self.all_model_classes[0](config).eval()
        with torch.no_grad():  # else all images have the same caption, of one token repeated
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        return model, {"pixel_values": torch.randn_like(inputs["pixel_values"]) * 3}

    def check_equal(self, model, inputs, settings, **changed):
        expected, got = (model.generate(**inputs, **kwargs) for kwargs in (settings, settings | changed))
        self.assertEqual(expected.tolist(), got.tolist())

    def check_continued(self, with_image: bool):
        model, inputs = self.model_and_inputs()
        whole = model.generate(**inputs, **GREEDY | {"min_new_tokens": 2 * NEW, "max_new_tokens": 2 * NEW})
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        rest = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
        rest |= inputs if with_image else {}
        got = model.generate(**rest, **GREEDY, past_key_values=first.past_key_values)
        self.assertEqual(whole.tolist(), got.tolist())

    def test_generation_greedy_dict_outputs(self):
        model, inputs = self.model_and_inputs()
        recorded = ("scores", "logits", "attentions", "hidden_states")
        wanted = {f"output_{name}": True for name in recorded}
        outputs = model.generate(**inputs, **GREEDY, **wanted, return_dict_in_generate=True)
        for name in recorded:
            with self.subTest(name):
                self.assertEqual(len(outputs[name]), NEW)
        self.assertEqual(outputs.sequences.tolist(), model.generate(**inputs, **GREEDY).tolist())
        layers = model.config.text_config.num_hidden_layers
        self.assertEqual([len(outputs.attentions[0]), len(outputs.hidden_states[0])], [layers, layers + 1])

    def test_generation_use_cache(self):
        self.check_equal(*self.model_and_inputs(), GREEDY, use_cache=False)

    def test_generation_use_cache_beam_search(self):
        self.check_equal(*self.model_and_inputs(), GREEDY | {"num_beams": 3}, use_cache=False)

    def test_generation_cache_implementation_dynamic(self):
        self.check_equal(*self.model_and_inputs(), GREEDY, cache_implementation="dynamic")

    def test_generation_cache_implementation_static(self):
        self.check_equal(*self.model_and_inputs(), GREEDY, cache_implementation="static")

    def test_generation_cache_config_in_generation_config(self):
        settings = GenerationConfig(**GREEDY, cache_implementation="dynamic")
        self.check_equal(*self.model_and_inputs(), GREEDY, generation_config=settings)

    def test_generation_continue_from_past_key_values(self):
        self.check_continued(with_image=True)

    def test_generation_continue_from_past_key_values_without_image(self):
        self.check_continued(with_image=False)

    def test_generation_prompt_lookup(self):
        self.check_equal(*self.model_and_inputs_of_one(), GREEDY, prompt_lookup_num_tokens=2)

    def test_generation_assistant(self):
        model, inputs = self.model_and_inputs_of_one()
        self.check_equal(model, inputs, GREEDY, assistant_model=copy.deepcopy(model))

    def model_and_inputs_of_one(self):
        model, inputs = self.model_and_inputs()
        return model, {name: value[:1] for name, value in inputs.items()}

    def test_generation_sample_same_seed(self):
        model, inputs = self.model_and_inputs()
        tokens = []
        for recorded in ({}, {"output_scores": True, "return_dict_in_generate": True}):
            torch.manual_seed(0)
            outputs = model.generate(**inputs, **GREEDY | {"do_sample": True}, **recorded)
            tokens.append((outputs.sequences if recorded else outputs).tolist())
        self.assertEqual(*tokens)

    def test_generation_num_return_sequences(self):
        model, inputs = self.model_and_inputs()
        rows = len(inputs["pixel_values"])
        for settings in ({"num_beams": 3}, {"do_sample": True}, {"do_sample": True, "num_beams": 3}):
            with self.subTest(str(settings)):
                tokens = model.generate(**inputs, **GREEDY | settings, num_return_sequences=2)
                self.assertEqual(len(tokens), 2 * rows)

    def test_generation_beam_scores_are_transition_scores(self):
        model, inputs = self.model_and_inputs()
        settings = GREEDY | {"num_beams": 3, "length_penalty": 0.0}
        outputs = model.generate(**inputs, **settings, return_dict_in_generate=True, output_scores=True)
        scores = model.compute_transition_scores(outputs.sequences, outputs.scores, outputs.beam_indices)
        torch.testing.assert_close(scores.sum(1), outputs.sequences_scores)

    def test_generation_left_padding(self):
        model, inputs = self.model_and_inputs()
        text, rows = model.config.text_config, len(inputs["pixel_values"])
        prompt = torch.tensor([[text.bos_token_id, 7, 11, text.sep_token_id]] * rows)  # stock drops the last token
        padded = torch.nn.functional.pad(prompt, (2, 0), value=text.pad_token_id)
        plain = model.generate(**inputs, input_ids=prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
        mask = (padded != text.pad_token_id).long()
        got = model.generate(**inputs, input_ids=padded, attention_mask=mask, **GREEDY)
        self.assertEqual(plain[:, -NEW:].tolist(), got[:, -NEW:].tolist())

    def test_generation_eos_token_id(self):
        model, inputs = self.model_and_inputs()
        rows = model.generate(**inputs, **GREEDY)[:, -NEW:].tolist()
        end = next((token for row in rows for token in row if any(token not in other for other in rows)), None)
        if end is None:
            self.skipTest("all captions are of the same tokens")
        rows = [row[: row.index(end) + 1] if end in row else row for row in rows]
        got = model.generate(**inputs, **GREEDY | {"min_new_tokens": 0}, eos_token_id=end, pad_token_id=3)
        self.assertEqual(got[:, -NEW:].tolist(), [row + [3] * (NEW - len(row)) for row in rows])

    def test_generation_stopping_criteria_and_streamer(self):
        class AfterTwo(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.full((len(input_ids),), input_ids.shape[1] >= 3)

        class Counter(BaseStreamer):
            pieces, ended = 0, False

            def put(self, value):
                self.pieces += 1

            def end(self):
                self.ended = True

        model, inputs = self.model_and_inputs_of_one()
        counter = Counter()
        tokens = model.generate(
            **inputs, **GREEDY, stopping_criteria=StoppingCriteriaList([AfterTwo()]), streamer=counter
        )
        self.assertEqual((tokens.shape[1], counter.pieces, counter.ended), (3, 3, True))

    def test_generation_arguments_unchanged(self):
        model, inputs = self.model_and_inputs()
        prompt = torch.tensor([[5, 7, 11, 13]] * len(inputs["pixel_values"]))
        before, settings = prompt.clone(), model.generation_config.to_dict()
        model.generate(**inputs, input_ids=prompt, **GREEDY)
        self.assertTrue(torch.equal(before, prompt))
        self.assertEqual(settings, model.generation_config.to_dict())
