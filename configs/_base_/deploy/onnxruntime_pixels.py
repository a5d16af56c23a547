"""For mmdeploy: a segmenter for plain ONNX Runtime, every batch and image size."""

onnx_config = dict(
    type='onnx',
    export_params=True,
    keep_initializers_as_inputs=False,
    opset_version=16,
    optimize=False,
    save_file='end2end.onnx',
    input_shape=None,
    input_names=['input'],
    output_names=['output'],
    dynamic_axes=dict(
        input={0: 'batch', 2: 'height', 3: 'width'}, output={0: 'batch', 2: 'height', 3: 'width'}
    ),
)
backend_config = dict(type='onnxruntime')
codebase_config = dict(type='mmseg', task='Segmentation', model_type='end2end', with_argmax=True)
