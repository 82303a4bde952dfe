"""The flow of IPEX's scripts for language models, under IPEX's name: quantize, trace and save; load and generate."""

import subprocess
import sys
import textwrap

SCRIPT = textwrap.dedent("""
    import sys
    import torch
    import intel_extension_for_pytorch as ipex
    from intel_extension_for_pytorch.llm.utils import shard_low_precision_checkpoint
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, torchscript=True)
    int8 = ipex.quantization.WoqWeightDtype.INT8
    qconfig = ipex.quantization.get_weight_only_quant_qconfig_mapping(weight_dtype=int8)
    past = tuple((torch.zeros(1, 0, 0, 1, dtype=torch.long), torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16),
                  torch.zeros(2048, 4, dtype=torch.long)) for _ in range(2))
    ids = torch.arange(3, 35).unsqueeze(0)
    example = ids, torch.ones(1, 32), past, torch.arange(32).unsqueeze(0)
    quantized = ipex.llm.optimize(LlamaForCausalLM(config).eval(), quantization_config=qconfig, deployment_mode=False)
    with torch.no_grad():
        by_name = dict(zip(("input_ids", "attention_mask", "past_key_values", "position_ids"), example))
        for arguments in ({"example_inputs": example}, {"example_kwarg_inputs": by_name}):
            graph = torch.jit.trace(quantized.eval(), strict=False, check_trace=False, **arguments)
            torch.jit.freeze(graph.eval()).save(sys.argv[1])

            fresh = LlamaForCausalLM(config).eval()
            fresh = ipex.llm.optimize(fresh, quantization_config=ipex.quantization.default_static_qconfig_mapping,
                                      inplace=True, deployment_mode=False)
            assert not hasattr(fresh, "trace_graph")
            graph = torch.jit.freeze(torch.jit.load(sys.argv[1]).eval())
            ipex._set_optimized_model_for_generation(fresh, optimized_model=graph)
            for beams in (1, 4):
                tokens = [model.generate(ids, max_new_tokens=6, min_new_tokens=6, num_beams=beams, do_sample=False)
                          for model in (quantized, fresh)]
                assert torch.equal(*tokens) and tokens[0].shape == (1, 38)
    print("generated")
""")


def test_quantize_trace_save_load_generate(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", "-m", "ipex_quant.run", "script.py", "graph.pt"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip().endswith("generated"), result.stderr
