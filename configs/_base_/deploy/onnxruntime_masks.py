"""For mmdeploy: a detector of boxes and masks for plain ONNX Runtime."""

_base_ = './onnxruntime_boxes.py'

onnx_config = dict(
    output_names=['dets', 'labels', 'masks'],
    dynamic_axes=dict(masks={0: 'batch', 1: 'num_dets', 2: 'height', 3: 'width'}),
)
# Masks of 28 x 28 for each box; to paste them into the image is left to who runs it.
codebase_config = dict(post_processing=dict(export_postprocess_mask=False))
