"""Where every config of this project finds its ImageNet weights: the one place to change a path."""

pretrained = dict(
    # Released by the authors of SSN, ResNet-50 trained with 8 x 2 images,
    # MD5 dadb0f1a0c49c31aedd6cb83d4996a03. Put it there under this name.
    ssn_r50='checkpoints/ssn_8x2_75.848.pth',
    # Released by the authors of SN, ResNet-50 trained with 8 x 2 images. Put it there, under this
    # name of ours.
    sn_r50='checkpoints/sn_8x2.pth',
    # torchvision's ResNet-50 by its address: 'torchvision://resnet50' would import torchvision.
    bn_r50='https://download.pytorch.org/models/resnet50-0676ba61.pth',
    # Takes the same RGB input as the other three; 'detectron/resnet50_gn' wants BGR, unscaled.
    gn_r50='open-mmlab://contrib/resnet50_gn',
)
